"""Fused GPU kernels in Triton: online-softmax attention, norms and softmax.

Light to import: Triton is loaded, and a kernel compiled, on first use. With TRITON_INTERPRET=1, set
before Triton is imported, the same kernels run on the CPU in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from ...ops.problem import AttentionProblem, Problem

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IMPLEMENTED = {
    "attention": "attention_launch",
    "attention_out": "attention_launch",
    "attention_backward": "attention_launch",
    "layer_norm": "norm_launch",
    "layer_norm_backward": "norm_launch",
    "add_layer_norm": "norm_launch",
    "add_layer_norm_backward": "norm_launch",
    "rms_norm": "norm_launch",
    "rms_norm_backward": "norm_launch",
    "masked_softmax": "softmax_launch",
    "masked_softmax_backward": "softmax_launch",
    "linear_cross_entropy": "cross_entropy_launch",
}


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
    if problem.op_name not in _IMPLEMENTED:
        return f"{problem.op_name} has no Triton kernel yet"
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


def __getattr__(name: str) -> Any:
    if name in _IMPLEMENTED:
        function = getattr(importlib.import_module(f".{_IMPLEMENTED[name]}", __package__), name)
        globals()[name] = function  # found without this detour from now on
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
