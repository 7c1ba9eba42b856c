"""The machine's limits: the loop does what is counted, and is not optimised away."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys

import pytest
import torch

from rowmax.bench.machine import fma, gpu
from rowmax.bench.machine import host as machine
from rowmax.bench.machine.host import copy_rate, describe, free_memory, measure_limits
from rowmax.bench.measure.timing import HostTimer


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


needs_dot_products = pytest.mark.skipif(
    not fma.has_dot_products(), reason="the CPU has none for bfloat16"
)


@needs_dot_products
@pytest.mark.parametrize("rounds", [0, 1, 9])
def test_the_loop_of_dot_products(rounds: int) -> None:
    """Two products of ones are added to every lane in each round."""
    assert fma.dot_chains(rounds) == fma.expected(rounds, 1.0, 2.0)


@needs_dot_products
def test_dot_products_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fma, "_dot_seconds", lambda rounds: rounds * 2e-9)
    assert fma.dot_product_peak(3) == pytest.approx(2 * 3 * 2 * fma.CHAINS * fma.LANES / 2e-9)
    monkeypatch.setattr(fma, "dot_chains", lambda _rounds: 1.0)
    with pytest.raises(RuntimeError, match="dot-product peak: the loop is wrong"):
        fma.dot_product_peak(1)


def test_without_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fma, "LANES", 8)
    assert fma.dot_product_peak(1) is None
    assert "dot products" not in machine.CpuLimits(2, 2e9, 1e9).text()
    assert "bfloat16 dot products 4 GFLOP/s" in machine.CpuLimits(2, 2e9, 1e9, 4e9).text()


LOOPS = """
from rowmax.bench.machine import fma
from rowmax.kernels.backends.cpu_numba import host

right = fma.expected(9, 0.75, 1.0)
assert abs(fma.fma_chains(9, 0.75, 1.0) - right) < 1e-5 * right
print(fma.LANES, fma.dot_product_peak(1, seconds=0.001, tries=1) is None)
print(host.native_vector_bits(), host.vector_bits(), host.bfloat16_dots())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64's features")
@pytest.mark.parametrize(
    "variable, without, lanes",
    [
        ("NUMBA_CPU_FEATURES", ("avx512bf16",), None),
        ("NUMBA_CPU_FEATURES", ("avx512",), 8),
        ("NUMBA_CPU_FEATURES", ("avx", "fma"), 4),
        ("NUMBA_ENABLE_AVX", None, 4),
        ("NUMBA_CPU_NAME", None, 4),
    ],
)
def test_numba_that_compiles_for_less_than_the_host(
    variable: str, without: tuple[str, ...] | None, lanes: int | None
) -> None:
    """In a process of its own, which LLVM would end."""
    from llvmlite.binding import get_host_cpu_features

    value = {"NUMBA_ENABLE_AVX": "0", "NUMBA_CPU_NAME": "generic"}.get(variable)
    if without is not None:
        found = get_host_cpu_features()
        for name in found:
            found[name] = found[name] and not name.startswith(without)
        value = found.flatten()
    lanes = min(fma.LANES, lanes or fma.LANES)
    done = subprocess.run(
        [sys.executable, "-c", LOOPS],
        env={**os.environ, variable: str(value)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{lanes} True\n{32 * lanes} {32 * lanes} False\n"


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
    monkeypatch.setattr("rowmax.bench.machine.host.perf_counter", lambda: float(next(ticks)))
    assert copy_rate(size, tries=2) == 2 * size * repeats


def test_limits_and_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowmax.bench.machine.host._LARGE", 1 << 14)
    limits = measure_limits()
    assert limits.as_json()["large_copy_bytes_per_s"] == limits.large_copy > 0
    assert limits.copy_bytes is None  # of what fits the caches it is another
    description = describe()
    assert description["cpu"]
    assert description["packages"]["torch"].startswith("2.")
    assert description["torch_threads"] >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says so in a file")
def test_free_memory_is_part_of_the_whole() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = free_memory()
    assert free is not None
    assert 0 < free < whole


def test_limits_of_a_gpu_count_operations_and_bytes() -> None:
    """On the CPU, where every sample takes three ticks for three calls."""
    ticks = itertools.count()
    timer = HostTimer(lambda: 3.0 * next(ticks))
    limits = gpu.measure_limits(
        torch.bfloat16, timer, device="cpu", matrix_size=16, copy_bytes=1024, tries=2
    )
    assert limits.flops == 2 * 16**3
    assert limits.copy_bytes == 2 * 1024
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
