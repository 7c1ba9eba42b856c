"""What the numbers were taken on: hardware, versions, load, and the machine's own limits."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch

from . import fma

PACKAGES = ("rowmax", "torch", "numpy", "numba", "llvmlite")
_LARGE = 2**28  # bytes, beyond any cache


class Limits(Protocol):
    """What a device can do at most, measured in the same run."""

    @property
    def flops(self) -> float:
        """Operations a second."""

    def copy_rate(self, size: int) -> float:
        """Bytes read and written a second by a copy of `size` bytes."""

    def text(self) -> str:
        """For a line of the report."""

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class CpuLimits:
    """With all the threads that the run uses."""

    threads: int
    flops: float  # float32, from registers
    copy_bytes: dict[int, float]  # bytes read and written a second, by the size of the copy

    def copy_rate(self, size: int) -> float:
        return self.copy_bytes[size]

    def text(self) -> str:
        largest = max(self.copy_bytes)
        copy = f"copy of {largest >> 20} MiB {self.copy_bytes[largest] / 1e9:.1f} GB/s"
        return f"float32 FMA {self.flops / 1e9:.0f} GFLOP/s, {copy}"

    def as_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "float32_fma_flops_per_s": self.flops,
            "copy_bytes_per_s": {str(size): rate for size, rate in self.copy_bytes.items()},
        }


def measure_limits(sizes: Iterable[int] = ()) -> CpuLimits:
    """The FMA peak, and the rate of a copy of 256 MiB and of each of `sizes` (bytes).

    A copy of what fits the caches is faster than memory, so each size has its own rate.
    """
    threads = torch.get_num_threads()
    rates = {size: copy_rate(size) for size in sorted({_LARGE, *sizes})}
    return CpuLimits(threads, fma.peak(threads), rates)


def copy_rate(size: int, tries: int = 7) -> float:
    """Bytes read and written a second by a copy of `size` bytes, the best of several tries.

    Into memory that is already there: `clone` asks the system for fresh pages, which takes longer
    than the copy itself, so that a kernel with a better allocator would exceed the "limit".
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
        "packages": {name: version(name) for name in PACKAGES},
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


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
