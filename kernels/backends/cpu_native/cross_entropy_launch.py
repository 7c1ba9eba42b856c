"""Linear cross entropy with the rows of logits by torch.ops.rowmax_native."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import statistics_dtype
from ..fused_cross_entropy import linear_cross_entropy_by


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, with_gradient: bool
) -> Tensor:
    losses = logits.new_empty(len(logits), dtype=statistics_dtype(logits.dtype))
    torch.ops.rowmax_native.cross_entropy.default(
        logits, target, losses, label_smoothing, ignore_index, with_gradient
    )
    return losses


linear_cross_entropy = linear_cross_entropy_by(cross_entropy)
