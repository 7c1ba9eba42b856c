"""The naive path: the whole contract in plain PyTorch; in float64, the oracle for every kernel.

It materialises the scores, runs on any device and dtype, and imports neither Numba nor Triton.
"""

from __future__ import annotations

from ...ops.problem import Problem
from .attention import attention, attention_backward, attention_out, naive_attention
from .cross_entropy import linear_cross_entropy
from .norms import (
    add_layer_norm,
    add_layer_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from .philox import attention_keep, keep_scale, keep_threshold, philox4x32, rows_keep
from .softmax import masked_softmax, masked_softmax_backward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_keep",
    "attention_out",
    "declines",
    "keep_scale",
    "keep_threshold",
    "layer_norm",
    "layer_norm_backward",
    "linear_cross_entropy",
    "masked_softmax",
    "masked_softmax_backward",
    "naive_attention",
    "philox4x32",
    "rms_norm",
    "rms_norm_backward",
    "rows_keep",
    "unavailable",
]


def unavailable() -> str | None:
    return None


def declines(problem: Problem) -> str | None:
    return None
