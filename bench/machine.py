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
from typing import Any

import torch

from . import fma

PACKAGES = ("rowmax", "torch", "numpy", "numba", "llvmlite")
_LARGE = 64 * 2**20  # float32 elements: 256 MiB, beyond any cache


@dataclass(frozen=True)
class Limits:
    """What this machine can do with all the threads that the run uses."""

    threads: int
    float32_flops: float  # a second, from registers
    copy_bytes: dict[int, float]  # bytes read and written a second, by the size of the copy

    def copy_rate(self, elements: int) -> float:
        return self.copy_bytes[elements]

    def as_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "float32_fma_flops_per_s": self.float32_flops,
            "copy_bytes_per_s": {
                str(4 * elements): rate for elements, rate in self.copy_bytes.items()
            },
        }


def measure_limits(sizes: Iterable[int] = ()) -> Limits:
    """The FMA peak, and the rate of a copy of 256 MiB and of each of `sizes` (float32 elements).

    A copy of what fits the caches is faster than memory, so each size has its own rate.
    """
    threads = torch.get_num_threads()
    rates = {elements: copy_rate(elements) for elements in sorted({_LARGE, *sizes})}
    return Limits(threads, fma.peak(threads), rates)


def copy_rate(elements: int, tries: int = 7) -> float:
    """Bytes read and written a second by a copy, the best of several tries.

    Into memory that is already there: `clone` asks the system for fresh pages, which takes longer
    than the copy itself, so that a kernel with a better allocator would exceed the "limit".
    """
    source, target = torch.ones(elements), torch.zeros(elements)
    repeats = max(1, (1 << 22) // elements)
    best = float("inf")
    for _ in range(tries):
        started = perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        best = min(best, (perf_counter() - started) / repeats)
    return 2 * 4 * elements / best


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
        "packages": {name: _version(name) for name in PACKAGES},
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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
