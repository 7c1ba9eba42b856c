"""From a masked softmax to its kernels: layouts, allocations and grids."""

from __future__ import annotations

import math

from torch import Tensor

from ...ops.layout import count_rows, rows_of
from ...ops.problem import SoftmaxProblem
from .arguments import contiguous, on_device
from .rows import forward_tile
from .softmax_rows import differentiate_weights, weigh

_LOG2_E = 1.4426950408889634


def masked_softmax(problem: SoftmaxProblem) -> Tensor:
    scores, mask, scale = problem
    _, heads, queries, keys = scores.shape
    weights = scores.new_empty(scores.shape)
    if not scores.numel():
        return weights
    if scores.stride(3) != 1:
        scores = scores.contiguous()
    dense_strides = (0, 0, 0, 0) if mask.dense is None else _broadcast_strides(mask.dense)
    # No |key - query| reaches this: a bound beyond says the same.
    reach = queries + keys
    lower, upper = (
        None if bound is None else max(-reach, min(bound, reach))
        for bound in (mask.band_lower, mask.band_upper)
    )
    rows, tile = count_rows(scores), forward_tile(keys, scores.dtype)
    with on_device(scores):
        weigh[(-(-rows // tile.rows),)](
            *(scores, scores.stride()[:3], weights, lower, upper),
            *(contiguous(mask.band), contiguous(mask.key_lengths)),
            *(contiguous(mask.query_lengths), contiguous(mask.query_documents)),
            *(contiguous(mask.key_documents), mask.dense, dense_strides),
            *(heads, queries, keys, rows),
            # A scale of 0 is a sign of 0: -inf must not be multiplied by it once it says 'masked'.
            math.copysign(1.0, scale) if scale != 0.0 else 0.0,
            abs(scale) * _LOG2_E if scale != 0.0 else 1.0,
            *(tile.rows, tile.columns, keys <= tile.columns),
            num_warps=tile.warps,
        )
    return weights


def masked_softmax_backward(grad_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    d_scores = weights.new_empty(weights.shape)
    if not weights.numel():
        return d_scores
    weights, weights_row = rows_of(weights)
    grad, grad_row = rows_of(grad_weights)
    rows, keys = count_rows(weights), weights.shape[-1]
    tile = forward_tile(keys, weights.dtype)
    with on_device(weights):
        differentiate_weights[(-(-rows // tile.rows),)](
            *(weights, weights_row, grad, grad_row, d_scores, keys, rows, scale),
            *(tile.rows, tile.columns, keys <= tile.columns),
            num_warps=tile.warps,
        )
    return d_scores


def _broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 for every dimension of size 1."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
