"""The machine's limits: the loop does what is counted, and is not optimised away."""

from __future__ import annotations

import itertools

import pytest
import torch

from rowmax.bench import fma, gpu
from rowmax.bench.machine import copy_rate, describe, measure_limits
from rowmax.bench.timing import HostTimer


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


@pytest.mark.parametrize("size, repeats", [(1 << 25, 1), (1 << 22, 4)])
def test_copy_rate_counts_bytes_read_and_written(
    size: int, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("rowmax.bench.machine.perf_counter", lambda: float(next(ticks)))
    assert copy_rate(size, tries=2) == 2 * size * repeats


def test_limits_and_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowmax.bench.machine._LARGE", 1 << 14)
    limits = measure_limits([4000])
    assert set(limits.copy_bytes) == {4000, 1 << 14}
    assert set(limits.as_json()["copy_bytes_per_s"]) == {"4000", "16384"}
    description = describe()
    assert description["cpu"]
    assert description["packages"]["torch"].startswith("2.")
    assert description["torch_threads"] >= 1


def test_limits_of_a_gpu_count_operations_and_bytes() -> None:
    """On the CPU, where every sample takes three ticks for three calls."""
    ticks = itertools.count()
    timer = HostTimer(lambda: 3.0 * next(ticks))
    limits = gpu.measure_limits(
        torch.bfloat16, timer, device="cpu", matrix_size=16, copy_bytes=1024, tries=2
    )
    assert limits.flops == 2 * 16**3
    assert limits.copy_rate(5) == limits.copy_bytes == 2 * 1024
    assert limits.as_json()["matrix_dtype"] == "bfloat16"
    assert "bfloat16 matrix product" in limits.text()


def test_a_gpu_in_words() -> None:
    described = {"name": "NVIDIA X", "capability": "9.0", "memory_bytes": 80 * 2**30}
    described |= {"driver": None, "cuda": "13.0", "cudnn": 91002, "triton": "3.6.0"}
    expected = "NVIDIA X, capability 9.0, 80 GiB, cuda 13.0, cudnn 91002, triton 3.6.0"
    assert gpu.text(described) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_here() -> None:
    described = gpu.describe()
    assert described["memory_bytes"] > 2**30
    assert described["name"] in gpu.text(described)
