"""The derivatives of the backward passes in plain PyTorch, which can be differentiated further.

With F the forward pass at inputs x, J its Jacobian there, B(g, x) = J^T g its backward pass and t
the gradient that arrives for B's result, the gradients of <B(g, x), t> = <g, J t> are

    by g:  J t, as if t were a tangent of x
    by x:  d<g, J t> / dx

Nothing is written in place: these functions run under `torch.func.vmap` too, where one tensor may
be batched and another not.

Attention, in the names of `attention.py`, with c1 and c2 the first two derivatives of the softcap:

    U = scale * (tQ K^T + Q tK^T);  E = c1 * U + t_bias;  e = sum_j P E + p_sink * t_sink;
    R = P * (E - e);  tO = (R * M) V + (P * M) tV;  t_lse = e

    W = (dO V^T) * M;  Y = (dO tV^T) * M;  delta = sum_j(P * W) - dlse;  Z = W * E + Y
    H = P * ((Z - sum_j P Z) - delta * (E - e) - e * (W - sum_j P W))        by the shifted scores
    dS' = H * c1 + P * (W - delta) * c2 * U                                  by the scores
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.layout import statistics_dtype
from ...ops.problem import AttentionProblem, LinearCrossEntropyProblem
from ..sequences import _sequences
from .attention import NaiveAttention, allowed_positions, attended_heads, grouped, naive_attention
from .cross_entropy import token_scale, wanted_distribution


class AttentionTangents(NamedTuple):
    """Tangents of the inputs that have a derivative; None stands for zero."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None


class _Moved(NamedTuple):
    """What moves with the tangents: (B, Hq, L, D) and (B, Hq, Lq, Lk), heads repeated."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor  # U
    shifted: Tensor  # E
    lse: Tensor  # e, (B, Hq, Lq, 1)
    sink_weight: Tensor  # p_sink, likewise


def attention_tangents(
    problem: AttentionProblem, tangents: AttentionTangents
) -> tuple[Tensor, Tensor]:
    """J t: tangents of out and lse, in the dtype of the statistics."""
    if problem.query_starts is not None:
        parts = [
            attention_tangents(sequence, _slice(tangents, rows, columns))
            for rows, columns, sequence in _sequences(problem)
        ]
        return _joined(parts, 0, problem), _joined(parts, 1, problem)
    naive = naive_attention(problem)
    moved = _moved(problem, naive, tangents)
    moved_weights = naive.weights * (moved.shifted - moved.lse)
    t_out = (moved_weights * naive.keep) @ naive.value + (naive.weights * naive.keep) @ moved.value
    return t_out, moved.lse.squeeze(-1)


def attention_second_order(
    problem: AttentionProblem,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tangents: AttentionTangents,
) -> tuple[Tensor, ...]:
    """d<g, J t> / dx for query, key, value, bias and sinks; the last two empty where absent."""
    if problem.query_starts is not None:
        parts = [
            attention_second_order(
                sequence,
                None if grad_out is None else grad_out[:, :, rows],
                None if grad_lse is None else grad_lse[:, :, rows],
                _slice(tangents, rows, columns),
            )
            for rows, columns, sequence in _sequences(problem)
        ]
        sinks = problem.query.new_zeros(0 if problem.sinks is None else problem.sinks.shape)
        for part in parts:
            sinks = sinks + part[4]
        rows_of = [_joined(parts, at, problem) for at in range(3)]
        return (*rows_of, problem.query.new_zeros(0), sinks)
    naive = naive_attention(problem)
    moved = _moved(problem, naive, tangents)
    weights, keep, dtype = naive.weights, naive.keep, naive.out.dtype
    attends_nothing = (naive.lse == -torch.inf).unsqueeze(-1)
    if grad_out is None:
        grad_out = torch.zeros_like(naive.out)
    d_out = grad_out.to(dtype).masked_fill(attends_nothing, 0.0)
    d_weights = (d_out @ naive.value.mT) * keep
    mean = (weights * d_weights).sum(-1, keepdim=True)
    delta = mean
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype).unsqueeze(-1).masked_fill(attends_nothing, 0.0)
    from_weights = d_weights * moved.shifted + (d_out @ moved.value.mT) * keep  # Z
    mean_from_weights = (weights * from_weights).sum(-1, keepdim=True)
    h_shifted = weights * (
        (from_weights - mean_from_weights)
        - delta * (moved.shifted - moved.lse)
        - moved.lse * (d_weights - mean)
    )
    d_shifted = weights * (d_weights - delta)
    h_scores, d_scores = h_shifted, d_shifted
    if problem.softcap is not None:
        tanh = torch.tanh(naive.scores / problem.softcap)
        first = 1.0 - tanh * tanh
        second = -2.0 * tanh * first / problem.softcap
        h_scores = h_shifted * first + d_shifted * second * moved.scores
        d_scores = d_shifted * first
    h_scores, d_scores = h_scores * problem.scale, d_scores * problem.scale
    h_query = h_scores @ naive.key + d_scores @ moved.key
    h_key = h_scores.mT @ naive.query + d_scores.mT @ moved.query
    h_value = (weights * (moved.shifted - moved.lse) * keep).mT @ d_out

    h_bias, h_sinks = h_query.new_zeros(0), h_query.new_zeros(0)
    if problem.bias is not None:
        h_bias = h_shifted.sum_to_size(problem.bias.shape)
    if problem.sinks is not None:
        moved_sink = moved.lse.new_zeros(())
        if tangents.sinks is not None:
            moved_sink = tangents.sinks.to(dtype).view(1, -1, 1, 1)
        of_sink = -mean_from_weights - delta * (moved_sink - moved.lse) + moved.lse * mean
        h_sinks = (moved.sink_weight * of_sink).sum((0, 2, 3))
    heads = problem.key.shape[1]
    return h_query, grouped(h_key, heads), grouped(h_value, heads), h_bias, h_sinks


def _moved(problem: AttentionProblem, naive: NaiveAttention, tangents: AttentionTangents) -> _Moved:
    dtype = naive.out.dtype
    allowed = allowed_positions(problem)
    query, key, value = (
        torch.zeros((), dtype=dtype, device=like.device).expand(like.shape)
        if tangent is None
        else tangent.to(dtype)
        for tangent, like in zip(
            tangents[:3], (problem.query, problem.key, problem.value), strict=True
        )
    )
    query, key, value = attended_heads(query, key, value, allowed)
    scores = problem.scale * (query @ naive.key.mT + naive.query @ key.mT)
    shifted = scores
    if problem.softcap is not None:
        shifted = scores * (1.0 - torch.tanh(naive.scores / problem.softcap) ** 2)
    if tangents.bias is not None:
        shifted = shifted + tangents.bias.to(dtype)
    if allowed is not None:
        shifted = shifted.masked_fill(~allowed, 0.0)
    lse = (naive.weights * shifted).sum(-1, keepdim=True)
    sink_weight = torch.zeros_like(lse)
    if problem.sinks is not None:
        total = naive.lse.masked_fill(naive.lse == -torch.inf, torch.inf)
        sink_weight = torch.exp(problem.sinks.to(dtype).view(1, -1, 1) - total).unsqueeze(-1)
        if tangents.sinks is not None:
            lse = lse + sink_weight * tangents.sinks.to(dtype).view(1, -1, 1, 1)
    return _Moved(query, key, value, scores, shifted, lse, sink_weight)


def _slice(tangents: AttentionTangents, rows: slice, columns: slice) -> AttentionTangents:
    """The tangents of one packed sequence."""
    query, key, value = (
        None if tangent is None else tangent[:, :, part]
        for tangent, part in zip(tangents[:3], (rows, columns, columns), strict=True)
    )
    return tangents._replace(query=query, key=key, value=value)


def _joined(parts: Sequence[tuple[Tensor, ...]], at: int, problem: AttentionProblem) -> Tensor:
    """The parts of all packed sequences, one after another along the length."""
    if parts:
        return torch.cat([part[at] for part in parts], dim=2)
    return problem.query.new_zeros(1, 0, 0, 0)


def masked_softmax_tangent(weights: Tensor, scale: float, tangent: Tensor) -> Tensor:
    """J t of the scores' tangent; it is B(t, x) as well, for this Jacobian is symmetric."""
    w, t = _attended(weights, tangent)
    return scale * w * (t - (w * t).sum(-1, keepdim=True))


def masked_softmax_second_order(
    grad_weights: Tensor, weights: Tensor, scale: float, tangent: Tensor
) -> Tensor:
    """d<g, J t> / d weights: the op's backward is a function of the weights, not of the scores."""
    w, g = _attended(weights, grad_weights)
    _, t = _attended(weights, tangent)
    return scale * (g * t - g * (w * t).sum(-1, keepdim=True) - t * (w * g).sum(-1, keepdim=True))


def _attended(weights: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the statistics; where the weight is 0, `other` may hold anything."""
    dtype = statistics_dtype(weights.dtype)
    return weights.to(dtype), other.to(dtype).masked_fill(weights == 0.0, 0.0)


def linear_cross_entropy_second_order(
    problem: LinearCrossEntropyProblem,
    grad_loss: Tensor,
    t_x: Tensor | None,
    t_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the gradient of the loss, by x and by the weight.

    With z = x W^T, p = softmax(z), R = (p - q) / tokens and the tangent U = tx W^T + x tW^T of z:
    <R, U>; by z, H = p * (U - sum_j p U) / tokens; by x, H W + R tW; by W, H^T x + R^T tx.
    """
    dtype = statistics_dtype(problem.x.dtype)
    x, weight = problem.x.to(dtype), problem.weight.to(dtype)
    t_x = torch.zeros_like(x) if t_x is None else t_x.to(dtype)
    t_weight = torch.zeros_like(weight) if t_weight is None else t_weight.to(dtype)
    p = (x @ weight.t()).softmax(-1)
    used = (problem.target != problem.ignore_index).unsqueeze(-1).to(dtype)
    factor = used * token_scale(problem, dtype)
    r = (p - wanted_distribution(problem, dtype)) * factor
    u = t_x @ weight.t() + x @ t_weight.t()
    h = p * (u - (p * u).sum(-1, keepdim=True)) * factor
    grad = grad_loss.to(dtype)
    h_x = (h @ weight + r @ t_weight) * grad
    h_weight = (h.t() @ x + r.t() @ t_x) * grad
    return (
        (r * u).sum().to(grad_loss.dtype),
        h_x.to(problem.x.dtype),
        h_weight.to(problem.weight.dtype),
    )


class _Norm:
    """x_hat = (x - mean) * rstd over the last dimension, and the projection P that derives it.

    P(t) = rstd * (t - mean(t) - x_hat * mean(x_hat * t)) is the tangent of x_hat, and, being
    symmetric, the gradient by x of <x_hat, t>; RMS norm has neither mean.
    """

    def __init__(self, x: Tensor, eps: float, subtract_mean: bool) -> None:
        x = x.to(statistics_dtype(x.dtype))
        self.subtract_mean = subtract_mean
        if subtract_mean:
            x = x - x.mean(-1, keepdim=True)
        self.rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
        self.x_hat = x * self.rstd

    def project(self, t: Tensor) -> Tensor:
        along = self.x_hat * (self.x_hat * t).mean(-1, keepdim=True)
        if self.subtract_mean:
            along = along + t.mean(-1, keepdim=True)
        return self.rstd * (t - along)

    def curvature(self, a: Tensor, t: Tensor) -> Tensor:
        """The gradient by x of <a, P(t)>, with a and t held."""
        along_a = (a * self.x_hat).mean(-1, keepdim=True)
        along_t = (t * self.x_hat).mean(-1, keepdim=True)
        product = (a * t).mean(-1, keepdim=True) - along_a * along_t
        if self.subtract_mean:
            product = product - a.mean(-1, keepdim=True) * t.mean(-1, keepdim=True)
        by_rstd = -self.rstd * self.rstd * self.x_hat * product
        return by_rstd - self.project(self.rstd * (a * along_t + t * along_a))


def norm_tangents(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    subtract_mean: bool,
    t_x: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
) -> Tensor:
    """J t: the tangent of y, in the dtype of the statistics."""
    norm = _Norm(x, eps, subtract_mean)
    t_y = torch.zeros_like(norm.x_hat)
    if t_x is not None:
        moved = norm.project(t_x.to(t_y.dtype))
        t_y = t_y + (moved if weight is None else moved * weight)
    if t_weight is not None:
        t_y = t_y + norm.x_hat * t_weight
    return t_y if t_bias is None else t_y + t_bias


def norm_second_order(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    subtract_mean: bool,
    grad_y: Tensor,
    t_x: Tensor | None,
    t_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """d<g, J t> / dx and by the weight (empty where that is absent); the bias has none."""
    norm = _Norm(x, eps, subtract_mean)
    grad_y = grad_y.to(norm.x_hat.dtype)
    h_x, h_weight = torch.zeros_like(norm.x_hat), norm.x_hat.new_zeros(0)
    if t_weight is not None:
        h_x = h_x + norm.project(grad_y * t_weight)
    if t_x is not None:
        t_x = t_x.to(norm.x_hat.dtype)
        h_x = h_x + norm.curvature(grad_y if weight is None else grad_y * weight, t_x)
    if weight is not None:
        moved = torch.zeros_like(norm.x_hat) if t_x is None else norm.project(t_x)
        h_weight = (grad_y * moved).sum_to_size(weight.shape)
    return h_x, h_weight
