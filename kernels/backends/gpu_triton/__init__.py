"""Fused GPU kernels in Triton: online-softmax attention, norms and softmax.

Light to import: Triton is loaded, and a kernel compiled, on first use. With TRITON_INTERPRET=1, set
before Triton is imported, the same kernels run on the CPU in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from ...ops.problem import AttentionProblem, Problem
from ..launches import on_first_use

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

__getattr__ = on_first_use(__name__)


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors on the CPU: once for a process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed (pip install "rowmax[triton]")'
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def declines(problem: Problem) -> str | None:
    first = problem[0]
    expected = "cpu" if interpreting() else "cuda"
    if first.device.type != expected:
        return f"tensors on {first.device}, not on {expected}"
    if first.dtype not in _DTYPES:
        return f"{first.dtype} is not done"
    if first.dtype == torch.bfloat16 and expected == "cuda" and _capability(first.device) < 80:
        major, minor = divmod(_capability(first.device), 10)
        return f"bfloat16 needs compute capability 8.0, and {first.device} has {major}.{minor}"
    if isinstance(problem, AttentionProblem) and max(problem.shape[2:]) >= 2**30:
        return "sequences of 2**30 and more are not done (positions are 32-bit)"
    return None


@functools.cache
def _capability(device: torch.device) -> int:
    """The compute capability as 80, of AMD's GPUs one that is enough for everything."""
    if torch.version.hip is not None:
        return 1000
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
