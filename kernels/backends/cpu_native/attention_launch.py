"""Attention through torch.ops.rowmax_native; the fast path goes past torch's dispatcher.

Strides and the division of work are in csrc/binding/attention_launch.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...api.masks import Causal, Dense, KeyLengths, Mask
from ...ops.layout import empty_heads
from ...ops.problem import AttentionProblem, BackwardInputs
from ..cpu_common.preparation import (
    backward_tensors,
    empty_lse,
    prepared,
    sums_to_finite,
    unit_last_stride,
)
from . import extension

# How `csrc/binding/fast_path_attention.cpp` is told the alignment of a causal mask; 0 is none.
_ALIGNMENTS = {None: 1, "upper_left": 2, "lower_right": 3}


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    lse = empty_lse(problem.query)
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
    out: Tensor | None
    out = extension().fast_path_attention(q, k, v, alignment, key_lengths, dense, scale)
    # NaN that only keys without a query hold reaches out as 0 * NaN; the general way leaves it out.
    return None if out is None or (dense is not None and not sums_to_finite(out)) else out


def _forward(problem: AttentionProblem, lse: Tensor | None) -> Tensor:
    """out, and what is written into lse."""
    out = empty_heads(problem.query, problem.value.shape[3])
    problem = prepared(problem)
    torch.ops.rowmax_native.attention_forward.default(out, lse, *problem.flat())
    return out


def attention_backward(
    problem: AttentionProblem, inputs: BackwardInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, problem = problem, prepared(problem)
    lse, grad_lse, d_bias, delta = tensors = backward_tensors(given, inputs)
    d_query, d_key, d_value = (empty_heads(x, x.shape[3]) for x in problem[:3])
    torch.ops.rowmax_native.attention_backward.default(
        *(unit_last_stride(inputs.out), lse, unit_last_stride(inputs.grad_out), grad_lse),
        *(d_query, d_key, d_value, d_bias, delta),
        *problem.flat(),
    )
    return d_query, d_key, d_value, *tensors.of_bias_and_sinks(given)
