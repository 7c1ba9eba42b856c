"""An attention problem that CPU kernels can read: what is copied, and why."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops.layout import statistics_dtype
from ...ops.problem import AttentionProblem

_MAX_FLOAT32_TERMS = 16  # gradients of a bias: float32 sums of so few are as exact as the terms


def prepared(problem: AttentionProblem) -> AttentionProblem:
    """The problem with every tensor in a layout and dtype that a kernel reads."""
    bias, mask, dtype = problem.bias, problem.mask, statistics_dtype(problem.query.dtype)
    if bias is not None:
        readable = bias.dtype == dtype or (bias.dtype.itemsize == 2 and dtype == torch.float32)
        bias = unit_last_stride(bias if readable else bias.to(dtype))
        problem = problem._replace(bias=bias)
    if bias is not None or mask.dense is not None or mask.query_documents is not None:
        problem = _without_unattended(problem)
    query, key, value = problem.query, problem.key, problem.value
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        problem = problem._replace(
            query=unit_last_stride(query),
            key=unit_last_stride(key),
            value=unit_last_stride(value),
        )
    if problem.alibi_slopes is not None:
        problem = problem._replace(alibi_slopes=problem.alibi_slopes.double().contiguous())
    if problem.sinks is not None:
        problem = problem._replace(sinks=problem.sinks.detach().double().contiguous())
    for name in ("key_lengths", "query_lengths", "band", "prefix_lengths"):
        tensor = getattr(mask, name)
        if tensor is not None and not tensor.is_contiguous():
            mask = mask._replace(**{name: tensor.contiguous()})
            problem = problem._replace(mask=mask)
    return problem


def _without_unattended(problem: AttentionProblem) -> AttentionProblem:
    """Zeros in the place of NaN and infinities that no query attends.

    Bands and lengths leave such keys unread, but a dense mask, documents or a -inf bias only give
    them weight 0, and 0 * NaN is NaN. Finite inputs, the usual case, cost one sum.
    """
    if sums_to_finite(problem.key) and sums_to_finite(problem.value):
        return problem
    batch, _, query_len, key_len = problem.shape
    unused = torch.ones(batch, key_len, dtype=torch.bool)
    step = 64
    for start in range(0, query_len, step):
        rows = min(step, query_len - start)
        allowed = problem.mask.rows(start, rows).allowed(rows, key_len, problem.query.device)
        if problem.bias is not None:
            bias = problem.bias
            if bias.shape[2] > 1:
                bias = bias[:, :, start : start + rows]
            attended = bias != -torch.inf
            allowed = attended if allowed is None else allowed & attended
        if allowed is None:
            return problem
        met = allowed.expand(batch, allowed.shape[1], rows, key_len)
        unused &= ~met.any(2).any(1)
    at = unused[:, None, :, None]
    return problem._replace(
        key=problem.key.masked_fill(at, 0.0), value=problem.value.masked_fill(at, 0.0)
    )


def sums_to_finite(tensor: Tensor) -> bool:
    """Whether the sum is finite: then so is every element.

    Torch widens a whole tensor to sum it in another dtype. Its sums of bfloat16 are computed in
    float32 and reach as far; those of float16 are kept to rows.
    """
    if tensor.dtype == torch.float16:
        tensor = tensor.sum(3).float()
    return math.isfinite(tensor.sum().item())


def bias_gradient(bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros for the gradient of a bias, where scores of `shape` are computed in `dtype`.

    Where each element is one pair's, as the bias, unless that is wider than `dtype`. A sum of many
    float32 is kept in float64, unless it will be rounded to a half type, or whole tiles are summed
    and few of them.
    """
    half = bias.dtype.itemsize == 2
    if tuple(bias.shape) == shape:
        rounded = half and dtype == torch.float32
        return torch.zeros(bias.shape, dtype=bias.dtype if rounded else dtype)
    exact = math.prod(shape) // max(1, bias.numel()) <= _MAX_FLOAT32_TERMS
    if tuple(bias.shape[2:]) == shape[2:] and (half or exact):
        return torch.zeros(bias.shape, dtype=dtype)
    return torch.zeros(bias.shape, dtype=torch.float64)


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def broadcast_strides(tensor: Tensor) -> list[int]:
    """Strides with 0 for every dimension of size 1."""
    return [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


_NO_DROPOUT = {"dropout": 0, "threshold": 0, "seed": 0, "keep_scale": 1.0}


def dropout_fields(dropout_p: float, seed: Tensor | None) -> dict[str, float]:
    """The fields of a call record that say what dropout does."""
    if dropout_p == 0.0 or seed is None:
        return _NO_DROPOUT
    # p = 1 wants 2**32, one more than a word holds; its keep_scale of 0 drops what is left
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return {"dropout": 1, "threshold": threshold, "seed": int(seed), "keep_scale": keep_scale}
