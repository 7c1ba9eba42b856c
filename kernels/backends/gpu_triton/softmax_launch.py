"""From a masked softmax to its kernels: layouts, allocations and grids."""

from __future__ import annotations

import math

from torch import Tensor

from ...ops.layout import broadcast_strides, count_rows, rows_of
from ...ops.problem import SoftmaxProblem
from . import plans
from .arguments import contiguous
from .rows import Tile, forward_tile
from .softmax import softmax_backward, softmax_forward

_LOG2_E = 1.4426950408889634


def masked_softmax(problem: SoftmaxProblem) -> Tensor:
    scores, mask, scale = problem
    if not scores.numel():
        return scores.new_empty(scores.shape)
    weights: Tensor
    (weights,) = plans.run(
        _plan_forward,
        [
            scores if scores.stride(3) == 1 else scores.contiguous(),
            *(mask.dense, contiguous(mask.band), contiguous(mask.prefix_lengths)),
            contiguous(mask.key_lengths),
            *(contiguous(mask.query_lengths), contiguous(mask.query_documents)),
            contiguous(mask.key_documents),
        ],
        (mask.band_lower, mask.band_upper, scale),
    )
    return weights


def _plan_forward(
    scores: Tensor,
    dense: Tensor | None,
    band: Tensor | None,
    prefix_lengths: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    *,
    launch: plans.Launch,
) -> tuple[Tensor]:
    _, heads, queries, keys = scores.shape
    weights = scores.new_empty(scores.shape)
    # No |key - query| reaches this: a bound beyond says the same.
    reach = queries + keys
    lower, upper = (
        None if bound is None else max(-reach, min(bound, reach))
        for bound in (band_lower, band_upper)
    )
    rows, tile = count_rows(scores), forward_tile(keys, scores.dtype)
    launch(
        softmax_forward,
        _configs(rows, keys, tile),
        {
            "scores": scores,
            "scores_strides": scores.stride()[:3],
            "weights": weights,
            "band_lower": lower,
            "band_upper": upper,
            "band": band,
            "prefix_lengths": prefix_lengths,
            "key_lengths": key_lengths,
            "query_lengths": query_lengths,
            "query_documents": query_documents,
            "key_documents": key_documents,
            "dense": dense,
            "dense_strides": (0, 0, 0, 0) if dense is None else broadcast_strides(dense),
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "rows": rows,
            # A scale of 0 is a sign of 0: -inf must not be multiplied by it once it says 'masked'.
            "sign": math.copysign(1.0, scale) if scale != 0.0 else 0.0,
            "factor": abs(scale) * _LOG2_E if scale != 0.0 else 1.0,
        },
    )
    return (weights,)


def masked_softmax_backward(grad_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    if not weights.numel():
        return weights.new_empty(weights.shape)
    inputs: list[Tensor | None] = [rows_of(weights)[0], rows_of(grad_weights)[0]]
    d_scores: Tensor
    (d_scores,) = plans.run(_plan_backward, inputs, (scale,))
    return d_scores


def _plan_backward(
    weights: Tensor, grad: Tensor, scale: float, *, launch: plans.Launch
) -> tuple[Tensor]:
    d_scores = weights.new_empty(weights.shape)
    rows, keys = count_rows(weights), weights.shape[-1]
    launch(
        softmax_backward,
        _configs(rows, keys, forward_tile(keys, weights.dtype)),
        {
            "weights": weights,
            "weights_row": rows_of(weights)[1],
            "grad": grad,
            "grad_row": rows_of(grad)[1],
            "d_scores": d_scores,
            "keys": keys,
            "rows": rows,
            "scale": scale,
        },
    )
    return (d_scores,)


def _configs(rows: int, keys: int, tile: Tile) -> list[plans.LaunchConfig]:
    sizes = {"ROWS": tile.rows, "KEYS": tile.columns, "WHOLE": keys <= tile.columns}
    return [(-(-rows // tile.rows), {**sizes, "num_warps": tile.warps})]
