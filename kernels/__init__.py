"""Fused attention and layer normalisation for PyTorch; start with `attention` and `explain`."""

from __future__ import annotations

from .biases import ALiBi
from .functional import (
    add_layer_norm,
    attention,
    explain,
    layer_norm,
    masked_softmax,
    rms_norm,
)
from .masks import Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window
from .packed import attention_varlen

__all__ = [
    "ALiBi",
    "Causal",
    "Dense",
    "Documents",
    "KeyLengths",
    "Mask",
    "QueryLengths",
    "Window",
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "explain",
    "layer_norm",
    "masked_softmax",
    "rms_norm",
]
