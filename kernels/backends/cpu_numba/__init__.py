"""Fused CPU kernels compiled by Numba from Python: online-softmax attention, norms and softmax.

Light to import: Numba is loaded, and a kernel compiled (or read from the disk cache), on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ...ops.problem import AttentionProblem, Problem

_IMPLEMENTED = {
    "attention": "attention_launch",
    "attention_out": "attention_launch",
    "attention_backward": "attention_launch",
    "masked_softmax": "softmax_launch",
    "masked_softmax_backward": "softmax_launch",
    "layer_norm": "norm_launch",
    "layer_norm_backward": "norm_launch",
    "add_layer_norm": "norm_launch",
    "add_layer_norm_backward": "norm_launch",
    "rms_norm": "norm_launch",
    "rms_norm_backward": "norm_launch",
    "linear_cross_entropy": "cross_entropy_launch",
}


def unavailable() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed (pip install numba)"
    try:
        host = importlib.import_module(".host", __package__)
        host.vector_bits()
    except (ImportError, ValueError, OSError) as error:
        return f"Numba does not load here: {error}"
    lacking = host.lacking()
    return f"Numba compiles for a processor without {lacking}" if lacking else None


def declines(problem: Problem) -> str | None:
    first = problem[0]
    if not first.is_cpu:
        return f"tensors on {first.device}, not on the CPU"
    if isinstance(problem, AttentionProblem) and max(problem.shape[2:]) >= 2**30:
        return "sequences of 2**30 and more are not done (positions are 32-bit)"
    return None


def __getattr__(name: str) -> Any:
    if name in _IMPLEMENTED:
        function = getattr(importlib.import_module(f".{_IMPLEMENTED[name]}", __package__), name)
        globals()[name] = function  # found without this detour from now on
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
