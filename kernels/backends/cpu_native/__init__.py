"""The compiled CPU backend: the C++ extension `rowmax.kernels._C` (sources in csrc/)."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import torch

from ...ops.problem import AttentionProblem, Problem
from .attention_launch import attention, attention_backward, attention_out, fast_path_attention
from .cross_entropy_launch import linear_cross_entropy
from .norm_launch import (
    add_layer_norm,
    add_layer_norm_backward,
    fast_path_norm,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from .softmax_launch import masked_softmax, masked_softmax_backward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_out",
    "declines",
    "fast_path_attention",
    "fast_path_norm",
    "layer_norm",
    "layer_norm_backward",
    "left_out_on_purpose",
    "linear_cross_entropy",
    "masked_softmax",
    "masked_softmax_backward",
    "rms_norm",
    "rms_norm_backward",
    "unavailable",
]


_REASON = Path(__file__).parents[2] / "missing_extension.txt"  # written by setup.py


def left_out_on_purpose() -> bool:
    """Whether rowmax was built with ROWMAX_EXTENSION=skip."""
    return _REASON.is_file() and _REASON.read_text().strip() == "ROWMAX_EXTENSION=skip"


@functools.cache
def unavailable() -> str | None:
    """Loads the extension, which registers its operators; why that fails, where it does."""
    try:
        importlib.import_module("..._C", __package__)
    except ModuleNotFoundError:
        why = f" ({_REASON.read_text().strip()})" if _REASON.is_file() else ""
        return (
            f"the C++ extension is not built{why}; with GCC >= 12 and Python's headers, "
            "`pip install --no-deps --force-reinstall --no-cache-dir .` in the checkout builds it"
        )
    except ImportError as error:
        return f"the C++ extension does not load with torch {torch.__version__}: {error}"
    try:
        torch.ops.rowmax_native.vector_bits()
        torch.ops.rowmax_native.bfloat16_dots()
    except RuntimeError as error:
        return str(error)
    return None


def declines(problem: Problem) -> str | None:
    first = problem[0]
    if not first.is_cpu:
        return f"tensors on {first.device}, not on the CPU"
    if isinstance(problem, AttentionProblem) and max(problem.shape[2:]) >= 2**30:
        return "sequences of 2**30 and more are not done (positions are 32-bit)"
    return None
