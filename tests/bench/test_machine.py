"""The machine's limits: the loop does what is counted, and is not optimised away."""

from __future__ import annotations

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


def test_peak_is_plausible_and_scales_with_threads() -> None:
    one = fma.peak(1, seconds=0.005, tries=3)
    two = fma.peak(2, seconds=0.005, tries=3)
    assert 1e9 < one < 1e12
    assert 1.2 * one < two < 2.8 * one


def test_a_loop_that_takes_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiler had found out that only the last round counts."""
    monkeypatch.setattr(fma, "_seconds", lambda _rounds: 0.05)
    with pytest.raises(RuntimeError, match="does not follow its rounds"):
        fma.peak(1)


def test_a_loop_with_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fma, "expected", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="the loop is wrong: expected 1.0"):
        fma.peak(1)


def test_copy_rate_is_plausible() -> None:
    assert 1e8 < copy_rate(1 << 16, tries=2) < 1e13


def test_limits_and_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowmax.bench.machine._LARGE", 1 << 14)
    limits = measure_limits([1000])
    assert set(limits.copy_bytes) == {1000, 1 << 14}
    assert set(limits.as_json()["copy_bytes_per_s"]) == {"4000", "65536"}
    description = describe()
    assert description["cpu"]
    assert description["packages"]["torch"].startswith("2.")
    assert description["torch_threads"] >= 1
