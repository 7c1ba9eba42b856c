"""The weights of chosen heads and rows, for looking at: what a fused kernel never writes down."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.problem import AttentionProblem
from ...ops.tracing import untraced
from .attention import heads_together, naive_attention


def attention_weights(
    problem: AttentionProblem, heads: list[int] | None, rows: list[int] | None
) -> Tensor:
    """softmax's weights, before dropout, (B, heads, rows, Lk) in q's dtype; None takes all.

    Differentiable by autograd. Memory is that of the result: chosen rows are computed one by one.
    """
    # Without columns of V nothing is summed.
    problem = problem._replace(value=problem.value[..., :0], dropout_p=0.0, seed=None)
    if heads is not None:
        problem = _of_heads(problem, heads)
    if rows is None:
        return naive_attention(problem).weights.to(problem.query.dtype)
    batch, count, _, key_len = problem.shape
    weights = [naive_attention(_of_row(problem, row)).weights for row in rows]
    if not weights:
        return problem.query.new_empty(batch, count, 0, key_len)
    return torch.cat(weights, dim=2).to(problem.query.dtype)


def _of_heads(problem: AttentionProblem, heads: list[int]) -> AttentionProblem:
    """The problem of some query heads, each with its own head of K."""
    query, key = problem.query, problem.key
    index = torch.tensor(heads, dtype=torch.int64, device=query.device)
    shared = index // heads_together(query, key)

    def chosen(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or untraced(tensor.size, 1) == 1:
            return tensor
        return tensor.index_select(1, index)

    sinks = problem.sinks
    return problem._replace(
        query=query.index_select(1, index),
        key=key.index_select(1, shared),
        value=problem.value.index_select(1, shared),
        bias=chosen(problem.bias),
        alibi_slopes=chosen(problem.alibi_slopes),
        sinks=None if sinks is None else sinks.index_select(0, index),
        mask=problem.mask._replace(dense=chosen(problem.mask.dense)),
    )


def _of_row(problem: AttentionProblem, row: int) -> AttentionProblem:
    bias, offset = problem.bias, problem.alibi_offset
    if bias is not None and untraced(bias.size, 2) > 1:
        bias = bias[:, :, row : row + 1]
    return problem._replace(
        query=problem.query[:, :, row : row + 1],
        bias=bias,
        alibi_offset=None if offset is None else offset + row,
        mask=problem.mask.rows(row, 1),
    )
