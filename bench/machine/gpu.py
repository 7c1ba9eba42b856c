"""The GPU of a measurement, and its measured limits."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.timing import Timer
from .host import CpuLimits, version

MATRIX_SIZE = 8192
COPY_BYTES = 2**30


@dataclass(frozen=True)
class GpuLimits:
    """The rates of torch's own matrix product, in one dtype, and copy."""

    dtype: torch.dtype
    flops: float
    copy_bytes: float  # of main memory: what is timed finds nothing in the cache

    def most_flops(self, dtype: torch.dtype) -> float | None:
        return self.flops if dtype == self.dtype else None

    def most_copied(self, _size: int) -> float:
        return self.copy_bytes

    def text(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        product = f"{dtype} matrix product {self.flops / 1e12:.0f} TFLOP/s"
        return f"{product}, copy {self.copy_bytes / 1e9:.0f} GB/s"

    def as_json(self) -> dict[str, Any]:
        return {
            "matrix_dtype": str(self.dtype).removeprefix("torch."),
            "matrix_flops_per_s": self.flops,
            "copy_bytes_per_s": self.copy_bytes,
        }


Limits = CpuLimits | GpuLimits  # of a device, measured in the same run


def measure_limits(
    dtype: torch.dtype,
    timer: Timer,
    device: str = "cuda",
    matrix_size: int = MATRIX_SIZE,
    copy_bytes: int = COPY_BYTES,
    tries: int = 10,
) -> GpuLimits:
    """The best of several tries of each."""
    # not of zeros, on which the matrix units run faster
    a, b = (
        torch.randn(matrix_size, matrix_size, device=device, dtype=torch.float32).to(dtype)
        for _ in range(2)
    )
    product = torch.empty_like(a)
    source = torch.ones(copy_bytes // 4, device=device, dtype=torch.float32)
    target = torch.zeros_like(source)
    best = {"product": math.inf, "copy": math.inf}
    for _ in range(tries):
        best["product"] = min(best["product"], timer.sample(lambda: torch.mm(a, b, out=product), 3))
        best["copy"] = min(best["copy"], timer.sample(lambda: target.copy_(source), 3))
    return GpuLimits(dtype, 2 * matrix_size**3 / best["product"], 2 * copy_bytes / best["copy"])


def describe() -> dict[str, Any]:
    """Hardware and versions, as they stand in the JSON."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version("triton"),
    }


def text(gpu: dict[str, Any]) -> str:
    """`describe()` as a line of the report."""
    memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
    parts = [f"{gpu['name']}, capability {gpu['capability']}", memory]
    parts += [f"{key} {gpu[key]}" for key in ("driver", "cuda", "cudnn", "triton") if gpu[key]]
    return ", ".join(parts)


def _driver() -> str | None:
    """The driver's version; None where its own tool is not there to tell it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None
