"""From a masked softmax to its kernels: layouts, allocations, and what is copied and why."""

from __future__ import annotations

from torch import Tensor

from ...ops.layout import count_rows, rows_of, statistics_dtype
from ...ops.problem import SoftmaxProblem
from ..cpu_common.constants import NO_BOUND
from ..cpu_common.preparation import broadcast_strides
from ..cpu_common.results import new_result
from .rows import task_rows
from .softmax import BACKWARD, FORWARD


def masked_softmax(problem: SoftmaxProblem) -> Tensor:
    scores, mask, scale = problem
    _, heads, queries, keys = scores.shape
    weights = new_result(scores, scores.shape)
    if scores.stride(3) != 1:
        scores = scores.contiguous()
    dense, dense_address = mask.dense, 0
    dense_strides = [0, 0, 0, 0]
    if dense is not None:
        if dense.shape[3] != 1 and dense.stride(3) != 1:
            dense = dense.contiguous()
        dense_address, dense_strides = dense.data_ptr(), broadcast_strides(dense)
    lengths = _contiguous(mask.key_lengths), _contiguous(mask.query_lengths)
    band, prefix = _contiguous(mask.band), _contiguous(mask.prefix_lengths)
    documents = _contiguous(mask.query_documents), _contiguous(mask.key_documents)
    computed = statistics_dtype(scores.dtype)
    narrow = scores.dtype != computed
    rows, task = count_rows(scores), task_rows(keys)
    lower = -NO_BOUND if mask.band_lower is None else max(mask.band_lower, -NO_BOUND)
    upper = NO_BOUND if mask.band_upper is None else min(mask.band_upper, NO_BOUND)
    FORWARD(
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
            "band_lower": lower,
            "band_upper": upper,
            "band": _address(band),
            "prefix_lengths": _address(prefix),
            "key_lengths": _address(lengths[0]),
            "query_lengths": _address(lengths[1]),
            "query_documents": _address(documents[0]),
            "key_documents": _address(documents[1]),
            "dense": dense_address,
            "dense_batch": dense_strides[0],
            "dense_head": dense_strides[1],
            "dense_row": dense_strides[2],
            "dense_column": dense_strides[3],
            "scale": scale,
        },
    )
    return weights


def masked_softmax_backward(grad_weights: Tensor, weights: Tensor, scale: float) -> Tensor:
    d_scores = new_result(weights, weights.shape)
    weights, weights_row = rows_of(weights)
    grad, grad_row = rows_of(grad_weights.to(weights.dtype))
    rows, keys = count_rows(weights), weights.shape[-1]
    task = task_rows(keys)
    BACKWARD(
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
    )
    return d_scores


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
