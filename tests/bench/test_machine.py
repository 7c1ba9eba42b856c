"""The machine's limits: the loop does what is counted, and is not optimised away."""

from __future__ import annotations

import itertools

import pytest

from rowmax.bench import fma
from rowmax.bench.machine import copy_rate, describe, measure_limits


@pytest.mark.parametrize("rounds", [0, 1, 2, 9, 30])
def test_the_loop_computes_what_it_says(rounds: int) -> None:
    got = fma.fma_chains(rounds, 0.75, 1.0)
    assert got == pytest.approx(fma.expected(rounds, 0.75, 1.0), rel=1e-6)


def test_the_loop_is_made_of_vector_instructions() -> None:
    """As many fused multiply-adds as chains at least, and no memory operand among them."""
    fma.fma_chains(1, 0.75, 1.0)
    (assembly,) = fma.fma_chains.inspect_asm().values()
    lines = [line for line in assembly.splitlines() if "vfm" in line or "fmla" in line]
    if not lines:
        pytest.skip("this CPU has no fused multiply-add instruction known to this test")
    assert len(lines) >= fma.CHAINS
    assert not any("ptr" in line or "(%r" in line for line in lines)


def test_peak_counts_operations_over_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fma, "_seconds", lambda rounds: rounds * 2e-9)
    one = 2 * fma.CHAINS * fma.LANES / 2e-9
    assert fma.peak(1) == pytest.approx(one)
    assert fma.peak(3) == pytest.approx(3 * one)


def test_peak_of_this_machine_is_plausible() -> None:
    assert 1e8 < fma.peak(1, seconds=0.005, tries=3) < 1e13


def test_a_loop_that_takes_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiler had found out that only the last round counts."""
    monkeypatch.setattr(fma, "_seconds", lambda _rounds: 0.05)
    with pytest.raises(RuntimeError, match="does not follow its rounds"):
        fma.peak(1)


def test_a_loop_with_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fma, "expected", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="the loop is wrong: expected 1.0"):
        fma.peak(1)


@pytest.mark.parametrize("elements, repeats", [(1 << 23, 1), (1 << 20, 4)])
def test_copy_rate_counts_bytes_read_and_written(
    elements: int, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("rowmax.bench.machine.perf_counter", lambda: float(next(ticks)))
    assert copy_rate(elements, tries=2) == 2 * 4 * elements * repeats


def test_limits_and_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowmax.bench.machine._LARGE", 1 << 14)
    limits = measure_limits([1000])
    assert set(limits.copy_bytes) == {1000, 1 << 14}
    assert set(limits.as_json()["copy_bytes_per_s"]) == {"4000", "65536"}
    description = describe()
    assert description["cpu"]
    assert description["packages"]["torch"].startswith("2.")
    assert description["torch_threads"] >= 1
