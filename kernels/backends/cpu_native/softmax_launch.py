"""Masked softmax through torch.ops.rowmax_native: layouts, and what is copied and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...api.masks import MaskStructure
from ...ops.layout import count_rows, rows_of
from ...ops.problem import SoftmaxProblem
from ..cpu_common.results import new_result


def masked_softmax(problem: SoftmaxProblem) -> Tensor:
    scores, mask = problem.scores, problem.mask
    weights = new_result(scores, scores.shape)
    if scores.stride(3) != 1:
        scores = scores.contiguous()
    fields: dict[str, Any] = {
        name: field.contiguous() if isinstance(field, Tensor) and name != "dense" else field
        for name, field in mask._asdict().items()
    }
    dense = mask.dense
    if dense is not None and dense.shape[3] != 1 and dense.stride(3) != 1:
        fields["dense"] = dense.contiguous()
    readable = SoftmaxProblem(scores, MaskStructure(**fields), problem.scale)
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
