"""Packed attention for backends without packed kernels: one sequence after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import empty_heads, saved_lse_dtype
from ..ops.problem import AttentionProblem, BackwardInputs

Forward = Callable[[AttentionProblem], tuple[Tensor, Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Backward = Callable[[AttentionProblem, BackwardInputs], Gradients]


def attention(forward: Forward, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """`forward` of every sequence; out (1, Hq, total_q, Dv), lse (1, Hq, total_q)."""
    query = problem.query
    out = empty_heads(query, problem.value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=saved_lse_dtype(query.dtype))
    for rows, _, sequence in _sequences(problem):
        out[:, :, rows], lse[:, :, rows] = forward(sequence)
    return out, lse


def attention_backward(
    backward: Backward, problem: AttentionProblem, inputs: BackwardInputs
) -> Gradients:
    """`backward` of every sequence; the sinks' gradients are summed in the order of sequences."""
    query, key, value = problem.query, problem.key, problem.value
    d_query, d_key, d_value = (empty_heads(x, x.shape[3]) for x in (query, key, value))
    d_sinks = query.new_empty(0)
    if inputs.sinks_grad and problem.sinks is not None:
        d_sinks = torch.zeros_like(problem.sinks)
    for rows, columns, sequence in _sequences(problem):
        gradients = backward(sequence, inputs.of_rows(rows))
        d_query[:, :, rows], d_key[:, :, columns], d_value[:, :, columns] = gradients[:3]
        d_sinks += gradients[4]
    return d_query, d_key, d_value, query.new_empty(0), d_sinks


def _sequences(problem: AttentionProblem) -> Iterator[tuple[slice, slice, AttentionProblem]]:
    """The queries and the keys of each sequence, and its problem."""
    assert problem.query_starts is not None
    assert problem.key_starts is not None
    starts_q, starts_k = problem.query_starts.tolist(), problem.key_starts.tolist()
    for b, (ends_q, ends_k) in enumerate(zip(pairwise(starts_q), pairwise(starts_k), strict=True)):
        rows, columns = slice(*ends_q), slice(*ends_k)
        own: dict[str, Any] = {
            name: None if tensor is None else tensor[b : b + 1] if tensor.shape[0] > 1 else tensor
            for name in ("alibi_slopes", "alibi_offset")
            for tensor in (getattr(problem, name),)
        }
        mask = problem.mask
        if mask.band is not None:
            mask = mask._replace(band=mask.band[b : b + 1])
        if mask.prefix_lengths is not None:
            mask = mask._replace(prefix_lengths=mask.prefix_lengths[b : b + 1])
        yield (
            rows,
            columns,
            problem._replace(
                query=problem.query[:, :, rows],
                key=problem.key[:, :, columns],
                value=problem.value[:, :, columns],
                mask=mask,
                batch_start=problem.batch_start + b,
                query_starts=None,
                key_starts=None,
                **own,
            ),
        )
