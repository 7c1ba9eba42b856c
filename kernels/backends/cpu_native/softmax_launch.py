"""Masked softmax through torch.ops.rowmax_native: layouts, and what is copied and why."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import count_rows, rows_of
from ...ops.problem import SoftmaxProblem
from ..cpu_common.preparation import prepared_softmax
from ..cpu_common.results import new_result


def masked_softmax(problem: SoftmaxProblem) -> Tensor:
    weights = new_result(problem.scores, problem.scores.shape)
    readable = prepared_softmax(problem)
    torch.ops.rowmax_native.softmax_forward.default(weights, *readable.flat())
    return weights


def masked_softmax_backward(grad_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    d_scores = new_result(weights, weights.shape)
    weights, weights_row = rows_of(weights)
    grad, grad_row = rows_of(grad_weights.to(weights.dtype))
    rows, keys = count_rows(weights), weights.shape[-1]
    torch.ops.rowmax_native.softmax_backward.default(
        weights, weights_row, grad, grad_row, d_scores, rows, keys, scale
    )
    return d_scores
