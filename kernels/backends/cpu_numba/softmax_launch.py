"""From a masked softmax to its kernels: layouts, allocations, and what is copied and why."""

from __future__ import annotations

from torch import Tensor

from ...ops.layout import count_rows, rows_of, statistics_dtype
from ...ops.problem import SoftmaxProblem
from ..cpu_common.preparation import prepared_softmax
from ..cpu_common.results import new_result
from .fields import mask_fields
from .rows import task_rows
from .softmax import BACKWARD, FORWARD


def masked_softmax(problem: SoftmaxProblem) -> Tensor:
    weights = new_result(problem.scores, problem.scores.shape)
    scores, mask, scale = prepared_softmax(problem)
    _, heads, queries, keys = scores.shape
    computed = statistics_dtype(scores.dtype)
    narrow = scores.dtype != computed
    rows, task = count_rows(scores), task_rows(keys)
    FORWARD.plan(
        scores.dtype,
        -(-rows // task),
        keys * computed.itemsize if narrow else 0,
        {
            "scores": scores.data_ptr(),
            "scores_batch": scores.stride(0),
            "scores_head": scores.stride(1),
            "scores_query": scores.stride(2),
            "weights": weights.data_ptr(),
            "heads": heads,
            "queries": queries,
            "keys": keys,
            "rows": rows,
            "task_rows": task,
            **mask_fields(mask),
            "scale": scale,
        },
    ).run()
    return weights


def masked_softmax_backward(grad_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    d_scores = new_result(weights, weights.shape)
    weights, weights_row = rows_of(weights)
    grad, grad_row = rows_of(grad_weights.to(weights.dtype))
    rows, keys = count_rows(weights), weights.shape[-1]
    task = task_rows(keys)
    BACKWARD.plan(
        weights.dtype,
        -(-rows // task),
        0,
        {
            "weights": weights.data_ptr(),
            "weights_row": weights_row,
            "grad": grad.data_ptr(),
            "grad_row": grad_row,
            "d_scores": d_scores.data_ptr(),
            "keys": keys,
            "rows": rows,
            "task_rows": task,
            "scale": scale,
        },
    ).run()
    return d_scores
