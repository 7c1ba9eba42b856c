"""Attention through torch.ops.rowmax_native; the fast path goes past torch's dispatcher.

Strides and the division of work are in csrc/binding/attention_launch.cpp.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ...api.masks import Causal, Dense, KeyLengths, Mask
from ...ops.layout import empty_heads, saved_lse_dtype, statistics_dtype
from ...ops.problem import AttentionProblem
from ..cpu_common.preparation import bias_gradient, prepared, sums_to_finite, unit_last_stride

# How `csrc/binding/fast_path_attention.cpp` is told the alignment of a causal mask; 0 is none.
_ALIGNMENTS = {None: 1, "upper_left": 2, "lower_right": 3}


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    query = problem.query
    lse = query.new_empty(query.shape[:3], dtype=saved_lse_dtype(query.dtype))
    return _forward(problem, lse), lse


def attention_out(problem: AttentionProblem) -> Tensor:
    return _forward(problem, None)


def fast_path_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, scale: float | None
) -> Tensor | None:
    """out of arguments that nobody has checked; None where the general way is needed."""
    alignment: int | None = 0
    key_lengths = dense = None
    if mask is not None:
        kind = type(mask)
        if kind is KeyLengths:
            key_lengths = mask.lengths  # type: ignore[union-attr]
        elif kind is Dense:
            dense = mask.tensor  # type: ignore[union-attr]
        elif kind is Causal and mask.prefix is None:  # type: ignore[union-attr]
            # (an alignment that is a tensor or a number is looked for in vain)
            alignment = _ALIGNMENTS.get(mask.align)  # type: ignore[union-attr]
        else:
            alignment = None
    if alignment is None:
        return None
    out = _attend()(q, k, v, alignment, key_lengths, dense, scale)
    # NaN that only keys without a query hold reaches out as 0 * NaN; the general way leaves it out.
    return None if out is None or (dense is not None and not sums_to_finite(out)) else out


@functools.cache
def _attend() -> Callable[..., Tensor | None]:
    extension = importlib.import_module("..._C", __package__)
    function: Callable[..., Tensor | None] = extension.fast_path_attention
    return function


def _forward(problem: AttentionProblem, lse: Tensor | None) -> Tensor:
    """out, and what is written into lse."""
    out = empty_heads(problem.query, problem.value.shape[3])
    problem = prepared(problem)
    torch.ops.rowmax_native.attention_forward.default(out, lse, *problem.flat())
    return out


def attention_backward(
    problem: AttentionProblem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    sinks_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, sinks = problem.bias, problem.sinks
    problem = prepared(problem)
    query, key, value = problem.query, problem.key, problem.value
    lse = lse.to(torch.float64).contiguous()
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float64).contiguous()
    d_bias = None
    if bias_grad and bias is not None:
        d_bias = bias_gradient(bias, problem.shape, statistics_dtype(query.dtype))
    delta = None
    if sinks_grad:
        # Rows that no tile of keys meets: out = 0, so that delta is -dlse.
        delta = torch.zeros_like(lse) if grad_lse is None else -grad_lse
    d_query, d_key, d_value = (empty_heads(x, x.shape[3]) for x in (query, key, value))
    torch.ops.rowmax_native.attention_backward.default(
        unit_last_stride(out),
        lse,
        unit_last_stride(grad_out),
        grad_lse,
        d_query,
        d_key,
        d_value,
        d_bias,
        delta,
        *problem.flat(),
    )
    d_sinks = None
    if delta is not None and sinks is not None:
        # -sum over batch and rows of exp(sink - lse) * delta
        taken = torch.exp(sinks.to(torch.float64).view(1, -1, 1) - lse)
        d_sinks = -(taken * delta).sum((0, 2)).to(sinks.dtype)
    return (
        *(d_query, d_key, d_value),
        query.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype),
        query.new_empty(0) if d_sinks is None else d_sinks,
    )
