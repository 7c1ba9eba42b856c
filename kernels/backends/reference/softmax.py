"""Masked softmax as the equation says it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import statistics_dtype
from ...ops.problem import SoftmaxProblem
from ...ops.tracing import untraced


def masked_softmax(problem: SoftmaxProblem) -> Tensor:
    scores = problem.scores
    scaled = scores.to(statistics_dtype(scores.dtype)) * problem.scale
    allowed = problem.mask.allowed(scores.shape[2], scores.shape[3], scores.device)
    if allowed is not None:
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    if untraced(scores.size, 3) == 0:
        return torch.empty_like(scores, memory_format=torch.contiguous_format)
    row_max = scaled.amax(-1, keepdim=True)
    exponentials = torch.exp(scaled - row_max.masked_fill(row_max == -torch.inf, 0.0))
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0.0, 1.0)
    return weights.to(scores.dtype).contiguous()


def masked_softmax_backward(grad_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    """scale * w * (dw - sum(w * dw)); where w = 0 the incoming gradient may hold anything."""
    dtype = statistics_dtype(weights.dtype)
    w = weights.to(dtype)
    d_w = grad_weights.to(dtype).masked_fill(w == 0.0, 0.0)
    d_scores = scale * w * (d_w - (w * d_w).sum(-1, keepdim=True))
    return d_scores.to(weights.dtype).contiguous()
