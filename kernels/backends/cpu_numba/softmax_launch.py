"""From a masked softmax to its kernels: layouts, allocations, and what is copied and why."""

from __future__ import annotations

from torch import Tensor

from ...ops.layout import count_rows, rows_of, statistics_dtype
from ...ops.problem import SoftmaxProblem
from ..cpu_common.constants import NO_BOUND
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
    dense_strides: tuple[int, ...] = (0, 0, 0, 0)
    if dense is not None:
        if dense.shape[3] != 1 and dense.stride(3) != 1:
            dense = dense.contiguous()
        dense_address, dense_strides = dense.data_ptr(), _broadcast_strides(dense)
    band, key_lengths, query_lengths, query_documents, key_documents = (
        None if tensor is None else tensor.contiguous()
        for tensor in (
            *(mask.band, mask.key_lengths, mask.query_lengths),
            *(mask.query_documents, mask.key_documents),
        )
    )
    computed = statistics_dtype(scores.dtype)
    narrow = scores.dtype != computed
    rows, task = count_rows(scores), task_rows(keys)
    FORWARD(
        scores.dtype,
        -(-rows // task),
        keys * computed.itemsize if narrow else 0,
        (
            *(scores.data_ptr(), *scores.stride()[:3], weights.data_ptr()),
            *(heads, queries, keys, rows, task),
            -NO_BOUND if mask.band_lower is None else max(mask.band_lower, -NO_BOUND),
            NO_BOUND if mask.band_upper is None else min(mask.band_upper, NO_BOUND),
            *(_address(band), _address(key_lengths), _address(query_lengths)),
            *(_address(query_documents), _address(key_documents), narrow),
            *(dense_address, *dense_strides),
        ),
        (scale,),
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
        (
            *(weights.data_ptr(), weights_row, grad.data_ptr(), grad_row, d_scores.data_ptr()),
            *(keys, rows, task),
        ),
        (scale,),
    )
    return d_scores


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 for every dimension of size 1."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
