"""The machine of a measurement: hardware, versions, load, and measured limits."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ... import __version__
from ...console import from_extra

PACKAGES = ("torch", "numpy", "numba", "llvmlite")
PEER_PACKAGES = ("onnxruntime", "openvino")  # told where they are installed
_LARGE = 2**28  # bytes, beyond any cache


@dataclass(frozen=True)
class CpuLimits:
    """With all the threads that the run uses."""

    threads: int
    flops: float  # float32, from registers
    large_copy: float  # bytes read and written a second by a copy beyond any cache
    dot_flops: float | None = None  # bfloat16 dot products, from registers; for peers only
    # As `large_copy`, whatever the size: none, since what fits the caches is faster, so a copy is
    # to be timed beside the calls that are compared with it.
    copy_bytes: None = None

    def most_flops(self, dtype: torch.dtype) -> float | None:
        """Operations a second in `dtype` that nothing here passes; None where that is not known."""
        if dtype.itemsize >= 4:
            return self.flops
        if torch.cpu._is_amx_tile_supported():  # whose products were not measured
            return None
        # float16 has instructions on vectors of twice as many elements
        return max(2 * self.flops, self.dot_flops or 0.0)

    def most_copied(self, size: int) -> float:
        """Bytes read and written a second by a copy that moves `size` of them."""
        return max(self.large_copy, copy_rate(max(4, size // 2)))

    def text(self) -> str:
        rates = [f"float32 FMA {self.flops / 1e9:.0f} GFLOP/s"]
        if self.dot_flops is not None:
            rates.append(f"bfloat16 dot products {self.dot_flops / 1e9:.0f} GFLOP/s")
        return ", ".join([*rates, f"copy of {_LARGE >> 20} MiB {self.large_copy / 1e9:.1f} GB/s"])

    def as_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "float32_fma_flops_per_s": self.flops,
            "bfloat16_dot_product_flops_per_s": self.dot_flops,
            "large_copy_bytes_per_s": self.large_copy,
        }


def measure_limits() -> CpuLimits:
    with from_extra(None):
        from . import fma  # by Numba
    threads = torch.get_num_threads()
    return CpuLimits(threads, fma.peak(threads), copy_rate(_LARGE), fma.dot_product_peak(threads))


def copy_rate(size: int, tries: int = 7) -> float:
    """Bytes read and written a second by a copy of `size` bytes, the best of several tries.

    Into memory that is already there, so that no time is spent on asking the system for it.
    """
    elements = -(-size // 4)  # of float32
    source, target = torch.ones(elements), torch.zeros(elements)
    repeats = max(1, (1 << 24) // size)
    best = float("inf")
    for _ in range(tries):
        started = perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        best = min(best, (perf_counter() - started) / repeats)
    return 2 * size / best


def describe() -> dict[str, Any]:
    """Hardware, versions, threads and load, as they stand in the JSON."""
    return {
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {
            "rowmax": __version__,  # installed or not
            **{name: version(name) for name in PACKAGES},
            **{name: here for name in PEER_PACKAGES if (here := version(name)) is not None},
        },
        "torch_threads": torch.get_num_threads(),
        "load_average": load_average(),
    }


def cpu_name() -> str:
    """The model as the system names it; the architecture where it does not."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load_average() -> tuple[float, float, float] | None:
    """Over 1, 5 and 15 minutes; None where the system keeps none."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def free_memory() -> int | None:
    """Bytes that programs may still take without swapping; None where the system does not say."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
