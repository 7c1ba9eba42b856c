"""Attention as the equations say it, scores and weights written out in full.

Forward, for one head (M = dropout's keep mask / (1 - p), all ones without dropout):

    S = scale * Q K^T;  C = softcap * tanh(S / softcap);  A = C + bias, -inf where masked
    lse = log(sum_j exp(A_j) + exp(sink));  P = exp(A - lse);  O = (P * M) V

Backward, from dO and dlse:

    dV = (P * M)^T dO;  dP = (dO V^T) * M;  delta = sum_j(dP * P) - dlse;  dA = P * (dP - delta)
    d_bias = dA;  d_sink = -sum_i exp(sink - lse) * delta;  dS = dA * (1 - tanh(S / softcap)^2)
    dQ = scale * dS K;  dK = scale * dS^T Q
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...api.biases import alibi_bias
from ...ops.layout import empty_heads, saved_lse_dtype, statistics_dtype
from ...ops.problem import AttentionProblem, BackwardInputs
from ...ops.tracing import untraced
from .. import sequences
from .philox import attention_keep, keep_scale


class NaiveScores(NamedTuple):
    """What stands before the softmax, in float32 or float64; heads of key and value repeated."""

    query: Tensor  # (B, Hq, Lq, D), zeros where a row may attend nothing
    key: Tensor  # (B, Hq, Lk, D), zeros where nobody attends
    value: Tensor  # (B, Hq, Lk, Dv), likewise
    scores: Tensor  # (B, Hq, Lq, Lk): S
    shifted: Tensor  # (B, Hq, Lq, Lk): A
    allowed: Tensor | None  # bool (B, Hq, Lq, Lk)


class NaiveAttention(NamedTuple):
    """Every intermediate result, in float32 or float64; heads of key and value repeated."""

    query: Tensor  # (B, Hq, Lq, D), zeros where a row may attend nothing
    key: Tensor  # (B, Hq, Lk, D), zeros where nobody attends
    value: Tensor  # (B, Hq, Lk, Dv), likewise
    scores: Tensor  # (B, Hq, Lq, Lk): S
    weights: Tensor  # (B, Hq, Lq, Lk): P
    keep: Tensor  # M, broadcastable to (B, Hq, Lq, Lk)
    lse: Tensor  # (B, Hq, Lq)
    out: Tensor  # (B, Hq, Lq, Dv): O


def naive_scores(problem: AttentionProblem) -> NaiveScores:
    _, _, query_len, key_len = problem.shape
    dtype = statistics_dtype(problem.query.dtype)
    query, key, value = problem.query.to(dtype), problem.key.to(dtype), problem.value.to(dtype)
    allowed = allowed_positions(problem)
    query, key, value = attended_heads(query, key, value, allowed)
    scores = problem.scale * (query @ key.transpose(-1, -2))
    shifted = scores
    if problem.softcap is not None:
        shifted = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.alibi_slopes is not None and problem.alibi_offset is not None:
        shifted = shifted + alibi_bias(
            problem.alibi_slopes.to(dtype), problem.alibi_offset, query_len, key_len
        )
    if problem.bias is not None:
        shifted = shifted + problem.bias.to(dtype)
    if allowed is not None:  # whatever the bias holds there, NaN too
        shifted = shifted.masked_fill(~allowed, -torch.inf)
    return NaiveScores(query, key, value, scores, shifted, allowed)


def naive_attention(problem: AttentionProblem, kept: Tensor | None = None) -> NaiveAttention:
    """The forward pass, differentiable by autograd; computes in float32 or float64.

    `kept`, bool (B, Hq, Lq, Lk), stands in for what dropout keeps by the seed.
    """
    query, key, value, scores, shifted, _ = naive_scores(problem)
    weights, lse = _softmax(shifted, problem.sinks)
    dtype, device = shifted.dtype, shifted.device
    keep = torch.ones((), dtype=dtype, device=device)
    if problem.dropout_p > 0.0 and problem.seed is not None:
        if kept is None:
            seed = problem.seed.to(device)
            kept = attention_keep(seed, problem.dropout_p, problem.shape, problem.batch_start)
        keep = kept.to(dtype) * keep_scale(problem.dropout_p)
    return NaiveAttention(
        query, key, value, scores, weights, keep, lse, out=(weights * keep) @ value
    )


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    if problem.query_starts is not None:
        return sequences.attention(attention, problem)
    naive = naive_attention(problem)
    out = empty_heads(problem.query, problem.value.shape[3]).copy_(naive.out)
    return out, naive.lse.to(saved_lse_dtype(out.dtype))


def attention_out(problem: AttentionProblem) -> Tensor:
    return attention(problem)[0]


def attention_backward(
    problem: AttentionProblem, inputs: BackwardInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if problem.query_starts is not None:
        return sequences.attention_backward(attention_backward, problem, inputs)
    *of_heads, d_bias, d_sinks = attention_gradients(problem, inputs)
    d_query, d_key, d_value = (
        empty_heads(tensor, tensor.shape[3]).copy_(gradient)
        for tensor, gradient in zip(problem[:3], of_heads, strict=True)
    )
    return d_query, d_key, d_value, d_bias.contiguous(), d_sinks


def attention_gradients(
    problem: AttentionProblem, inputs: BackwardInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass without an order of dimensions of its results in memory."""
    naive = naive_attention(problem)
    attends_nothing = (naive.lse == -torch.inf).unsqueeze(-1)
    d_out = inputs.grad_out.to(naive.out.dtype).masked_fill(attends_nothing, 0.0)
    d_value = (naive.weights * naive.keep).transpose(-1, -2) @ d_out
    d_weights = (d_out @ naive.value.transpose(-1, -2)) * naive.keep
    delta = (d_weights * naive.weights).sum(-1, keepdim=True)
    if inputs.grad_lse is not None:
        d_lse = inputs.grad_lse.to(delta.dtype).unsqueeze(-1)
        delta = delta - d_lse.masked_fill(attends_nothing, 0.0)
    d_shifted = naive.weights * (d_weights - delta)
    d_scores = d_shifted * problem.scale
    if problem.softcap is not None:
        d_scores = d_scores * (1.0 - torch.tanh(naive.scores / problem.softcap) ** 2)
    d_key = d_scores.transpose(-1, -2) @ naive.query

    d_bias, d_sinks = problem.query.new_empty(0), problem.query.new_empty(0)
    if inputs.bias_grad and problem.bias is not None:
        d_bias = d_shifted.sum_to_size(problem.bias.shape).to(problem.bias.dtype)
    if inputs.sinks_grad and problem.sinks is not None:
        sinks = problem.sinks.to(delta.dtype).view(1, -1, 1)
        taken = torch.exp(sinks - naive.lse.masked_fill(naive.lse == -torch.inf, torch.inf))
        d_sinks = -(taken * delta.squeeze(-1)).sum((0, 2)).to(problem.sinks.dtype)
    d_key, d_value = (grouped(gradient, problem.key.shape[1]) for gradient in (d_key, d_value))
    of_heads = zip((d_scores @ naive.key, d_key, d_value), problem[:3], strict=True)
    d_query, d_key, d_value = (gradient.to(tensor.dtype) for gradient, tensor in of_heads)
    return d_query, d_key, d_value, d_bias, d_sinks


def allowed_positions(problem: AttentionProblem) -> Tensor | None:
    """The mask, and where the bias is not -inf, as a bool tensor (B, Hq, Lq, Lk)."""
    _, _, query_len, key_len = problem.shape
    allowed = problem.mask.allowed(query_len, key_len, problem.query.device)
    if problem.bias is not None:
        attended = problem.bias != -torch.inf
        allowed = attended if allowed is None else allowed & attended
    return None if allowed is None else allowed.expand(problem.shape)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """weights and lse over the last dimension; a row of -inf gives zeros and lse = -inf."""
    batch, heads, query_len, _ = scores.shape
    if sinks is None:
        sink = scores.new_full((1, 1, 1, 1), -torch.inf)
    else:
        sink = sinks.to(scores.dtype).view(1, heads, 1, 1)
    extended = torch.cat((scores, sink.expand(batch, heads, query_len, 1)), dim=-1)
    row_max = extended.detach().amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    exponentials = torch.exp(extended - row_max)
    total = exponentials.sum(-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    lse = (row_max + total.log()).masked_fill(empty, -torch.inf)
    return exponentials[..., :-1] / total, lse.squeeze(-1)


def heads_together(query: Tensor, key: Tensor) -> int:
    """How many query heads share a head of the keys."""
    heads, key_heads = untraced(query.size, 1), untraced(key.size, 1)
    return heads // key_heads if key_heads else 1


def attended_heads(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of key and value repeated, and zeros where nobody attends, in the query's rows too:
    there may be NaN there, and 0 * NaN is NaN."""
    if allowed is not None:
        unused = ~allowed.any(2).any(1)[:, None, :, None]
        key, value = key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
        query = query.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    groups = heads_together(query, key)
    return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def grouped(gradient: Tensor, heads: int) -> Tensor:
    """(B, Hq, L, D) summed over each group of query heads."""
    if gradient.shape[1] == heads:
        return gradient
    return gradient.unflatten(1, (heads, gradient.shape[1] // heads)).sum(2)
