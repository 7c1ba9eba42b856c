"""Attention's passes as values only: nothing is written in place, whatever carries tangents.

A backend owes its results in the layout of `layout.empty_heads`, and `attention.py` copies them
there. Under `torch.func` one tensor may be batched and another not, and such a copy can't be made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import saved_lse_dtype
from ...ops.problem import AttentionProblem, BackwardInputs
from ..sequences import _sequences
from .attention import attention_gradients, naive_attention


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """out and lse."""
    query = problem.query
    if problem.query_starts is not None:
        parts = [attention(sequence) for _, _, sequence in _sequences(problem)]
        if not parts:
            return query.new_zeros(*query.shape[:3], problem.value.shape[3]), query.new_zeros(
                query.shape[:3], dtype=saved_lse_dtype(query.dtype)
            )
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)
    naive = naive_attention(problem)
    return naive.out.to(query.dtype), naive.lse.to(saved_lse_dtype(query.dtype))


def attention_backward(problem: AttentionProblem, inputs: BackwardInputs) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, bias and sinks; the last two empty unless asked for."""
    if problem.query_starts is None:
        return attention_gradients(problem, inputs)
    parts = [
        attention_gradients(sequence, inputs.of_rows(rows))
        for rows, _, sequence in _sequences(problem)
    ]
    if not parts:
        tensors = (problem.query, problem.key, problem.value)
        sinks = problem.sinks if inputs.sinks_grad else None
        d_sinks = problem.query.new_zeros(0 if sinks is None else sinks.shape)
        return (*(torch.zeros_like(x) for x in tensors), problem.query.new_zeros(0), d_sinks)
    d_query, d_key, d_value, d_biases, d_sinks_each = zip(*parts, strict=True)
    joined = (torch.cat(gradients, 2) for gradients in (d_query, d_key, d_value))
    return (*joined, d_biases[0], torch.stack(d_sinks_each).sum(0))
