"""A fused attention in plain PyTorch, right as it stands, and the ways to break it.

It goes over tiles of keys with a running row maximum, forward (Milakov & Gimelshein 2018,
algorithm 3) and backward (Dao et al. 2022, algorithm 4), as the kernels do. Each fault is one that
a kernel has had, or may have; `mutation.py` asks whether the suite notices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import Causal, Mask
from ...kernels.backends.reference import attention_keep
from ...kernels.ops.problem import AttentionProblem
from ...kernels.testing.oracle import AttentionCase, Kernel
from .implementations import Implementation

TILE = 16

# name -> what is wrong
FAULTS = {
    "mask-off-by-one": "each query attends one key more than its mask allows",
    "prefix-ignored": "causal masks hide the prefix that all queries may attend",
    "upper-left": "causal masks stand at the upper left where the lower right is asked for",
    "finite-mask": "masked scores are -1e9 instead of -inf",
    "no-rescale": "what is summed is not rescaled when the running maximum grows",
    "sum-not-rescaled": "the sum of weights is not rescaled, the output is",
    "no-maximum": "exp of the scores as they are",
    "maximum-from-zero": "the running maximum starts at 0",
    "scale-after-mask": "the scale multiplies bias and mask too",
    "last-tile-skipped": "keys beyond the last whole tile are left out",
    "statistics-in-half": "the running sum of weights is kept in half precision",
    "products-in-half": "q and k are rounded to half precision",
    "weights-in-half": "weights are rounded to half precision before the product with v",
    "dropout-unscaled": "kept weights do not grow by 1 / (1 - p)",
    "dropout-scale-squared": "kept weights grow by 1 / (1 - p) twice",
    "dropout-in-forward-only": "the backward pass drops nothing",
    "heads-interleaved": "query head h takes key head h % Hkv",
    "dk-dv-swapped": "the gradients of k and v change places in one tile",
    "no-delta": "the gradient of the softmax lacks the row's mean",
    "lse-without-gradient": "the gradient that arrives at lse is ignored",
    "dq-of-last-tile": "the gradient of q is written by each tile, not added to",
    "no-softcap-derivative": "the gradient passes softcap as if it were not there",
    "bias-gradient-of-one": "a bias that is shared has the gradient of the first that shares it",
    "sink-gradient-sign": "the gradient of the sinks has the wrong sign",
    "padding-in-products": "keys that nobody may attend take part, with weight 0",
}
# Wrong only where sums are wider than half: in half precision, kernels may do it.
WIDE_ONLY = frozenset({"products-in-half", "weights-in-half"})


class _Parts(NamedTuple):
    """A problem in the dtype of the sums; heads of key and value repeated."""

    query: Tensor  # (B, Hq, Lq, D)
    key: Tensor  # (B, Hq, Lk, D)
    value: Tensor  # (B, Hq, Lk, Dv)
    bias: Tensor | None  # broadcastable to (B, Hq, Lq, Lk)
    allowed: Tensor  # bool (B, Hq, Lq, Lk)
    keep: Tensor  # broadcastable to (B, Hq, Lq, Lk), 1 / (1 - p) where kept


class Mutant(Implementation):
    """`attention` with one fault of FAULTS, or none: an implementation like any other."""

    ops = ("attention",)

    def __init__(self, fault: str | None = None) -> None:
        self.name = fault or "tiled, no fault"
        self.fault = fault

    def kernel(self, op: str) -> Kernel:
        return self._attention

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        mask, bias, sinks = (options.pop(name, None) for name in ("mask", "bias", "sinks"))
        call = AttentionCase(q, k, v, mask, bias, sinks, options)
        bias = bias if isinstance(bias, Tensor) else None
        return _Tiled.apply(q, k, v, bias, sinks, call, self.fault)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        call: AttentionCase,
        fault: str | None,
    ) -> tuple[Tensor, Tensor]:
        if fault in _CAUSAL_FAULTS:
            call = replace(call, mask=_with_causal(call.mask, _CAUSAL_FAULTS[fault]))
        bias_or_alibi = call.bias if bias is None else bias
        problem = replace(call, q=q, k=k, v=v, bias=bias_or_alibi, sinks=sinks).naive_problem()
        parts = _parts_of(problem, fault)
        out, lse = _forward(problem, parts, fault)
        stored = out.to(q.dtype)
        ctx.save_for_backward(stored, lse)
        ctx.call = problem, parts, fault, bias
        return stored, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        problem, parts, fault, bias = ctx.call
        out, lse = ctx.saved_tensors
        d_out, d_lse = grads
        if d_out is None:
            d_out = torch.zeros_like(out)
        found = _backward(problem, parts, fault, (out, lse), (d_out, d_lse))
        d_query, d_key, d_value, d_bias, d_sinks = found
        if bias is not None and d_bias is not None:
            four = (1,) * (4 - bias.dim()) + tuple(bias.shape)
            d_bias = _bias_gradient(d_bias, four, fault).view(bias.shape).to(bias.dtype)
        return (
            d_query.to(problem.query.dtype),
            _sum_over_group(d_key, problem.key, fault),
            _sum_over_group(d_value, problem.value, fault),
            d_bias if bias is not None else None,
            d_sinks,
            None,
            None,
        )


# what a fault makes of a causal mask's fields
_CAUSAL_FAULTS: dict[str | None, dict[str, Any]] = {
    "upper-left": {"align": "upper_left"},
    "prefix-ignored": {"prefix": None},
}


def _with_causal(mask: Mask | Tensor | None, fields: dict[str, Any]) -> Mask | Tensor | None:
    if not isinstance(mask, Mask):
        return mask
    joined: Mask | None = None
    for part in mask.parts():
        changed = replace(part, **fields) if isinstance(part, Causal) else part
        joined = changed if joined is None else joined & changed
    return joined


def _parts_of(problem: AttentionProblem, fault: str | None) -> _Parts:
    dtype = torch.promote_types(problem.query.dtype, torch.float32)
    query, key, value = (tensor.detach().to(dtype) for tensor in problem[:3])
    shape = problem.shape
    allowed = problem.mask.allowed(shape[2], shape[3], query.device)
    allowed = torch.ones(shape, dtype=torch.bool) if allowed is None else allowed.expand(shape)
    bias = None if problem.bias is None else problem.bias.detach().to(dtype)
    if bias is not None:
        allowed = allowed & (bias != -torch.inf)
    if fault == "mask-off-by-one":
        allowed = torch.cat((allowed[..., :1], allowed[..., 1:] | allowed[..., :-1]), dim=-1)
    if fault != "padding-in-products":
        unused = ~allowed.any(2).any(1)[:, None, :, None]
        key, value = key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    groups = shape[1] // key.shape[1] if key.shape[1] else 1
    if fault == "heads-interleaved":
        key, value = (tensor.repeat(1, groups, 1, 1) for tensor in (key, value))
    else:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    keep = torch.ones((), dtype=dtype)
    if problem.dropout_p > 0.0 and problem.seed is not None:
        keep_mask = attention_keep(problem.seed, problem.dropout_p, shape)
        factor = 1 / (1 - problem.dropout_p)
        power = {"dropout-unscaled": 0, "dropout-scale-squared": 2}.get(fault or "", 1)
        keep = keep_mask.to(dtype) * factor**power
    return _Parts(query, key, value, bias, allowed, keep)


def _tiles(key_len: int, fault: str | None) -> list[slice]:
    end = key_len // TILE * TILE if fault == "last-tile-skipped" else key_len
    return [slice(start, min(start + TILE, end)) for start in range(0, end, TILE)]


def _scores(
    problem: AttentionProblem, parts: _Parts, tile: slice, fault: str | None
) -> tuple[Tensor, Tensor]:
    """The scores before softcap, and what the softmax is of, for one tile of keys."""
    query, key = parts.query, parts.key[:, :, tile]
    if fault == "products-in-half":
        query, key = _halved(query), _halved(key)
    product = query @ key.transpose(-1, -2)
    scaled = product if fault == "scale-after-mask" else problem.scale * product
    capped = scaled
    if problem.softcap is not None:
        capped = problem.softcap * torch.tanh(scaled / problem.softcap)
    if parts.bias is not None:
        bias = parts.bias
        capped = capped + (bias[..., tile] if bias.shape[-1] > 1 else bias)
    masked = -1e9 if fault == "finite-mask" else -torch.inf
    capped = capped.masked_fill(~parts.allowed[..., tile], masked)
    return scaled, problem.scale * capped if fault == "scale-after-mask" else capped


def _forward(problem: AttentionProblem, parts: _Parts, fault: str | None) -> tuple[Tensor, Tensor]:
    """out and lse in the dtype of the sums."""
    batch, heads, rows, _ = parts.query.shape
    row_max = parts.query.new_full((batch, heads, rows, 1), -torch.inf)
    row_sum = torch.zeros_like(row_max)
    out = parts.query.new_zeros(batch, heads, rows, parts.value.shape[3])
    if problem.sinks is not None:
        row_max = problem.sinks.detach().to(out.dtype).view(1, -1, 1, 1).expand_as(row_max)
        row_sum = torch.ones_like(row_max)
    if fault in ("maximum-from-zero", "no-maximum"):
        start = torch.zeros_like(row_max)
        row_sum = row_sum * (row_max - start).exp()
        row_max = start
    for tile in _tiles(parts.key.shape[2], fault):
        _, scores = _scores(problem, parts, tile, fault)
        new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
        if fault == "no-maximum":
            new_max = row_max
        shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
        weights = torch.exp(scores - shift)
        factor = torch.exp(row_max - shift)
        if fault == "no-rescale":
            factor = torch.ones_like(factor)
        sum_factor = torch.ones_like(factor) if fault == "sum-not-rescaled" else factor
        row_sum = row_sum * sum_factor + weights.sum(-1, keepdim=True)
        if fault == "statistics-in-half":
            row_sum = _halved(row_sum)
        dropped = weights * _tile_of(parts.keep, tile)
        if fault == "weights-in-half":
            dropped = _halved(dropped)
        out = out * factor + dropped @ parts.value[:, :, tile]
        row_max = new_max
    empty = row_sum == 0.0
    lse = (row_max + row_sum.log()).masked_fill(empty, -torch.inf)
    return out / row_sum.masked_fill(empty, 1.0), lse.squeeze(-1)


def _backward(
    problem: AttentionProblem,
    parts: _Parts,
    fault: str | None,
    saved: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value (heads repeated), bias (B, Hq, Lq, Lk) and sinks."""
    out, lse = saved[0].to(parts.query.dtype), saved[1].unsqueeze(-1)
    d_out = grads[0].to(out.dtype)
    d_out = d_out.masked_fill(lse == -torch.inf, 0.0)
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)
    delta = (d_out * out).sum(-1, keepdim=True)
    if fault == "no-delta":
        delta = torch.zeros_like(delta)
    if grads[1] is not None and fault != "lse-without-gradient":
        delta = delta - grads[1].to(out.dtype).unsqueeze(-1)
    d_query = torch.zeros_like(parts.query)
    d_key, d_value = torch.zeros_like(parts.key), torch.zeros_like(parts.value)
    d_bias = None
    if problem.bias is not None:
        d_bias = parts.query.new_zeros(problem.shape)
    for number, tile in enumerate(_tiles(parts.key.shape[2], fault)):
        scaled, scores = _scores(problem, parts, tile, fault)
        weights = torch.exp(scores - shift)
        keep = _tile_of(parts.keep, tile)
        if fault == "dropout-in-forward-only":
            keep = torch.ones_like(keep)
        d_value[:, :, tile] = (weights * keep).transpose(-1, -2) @ d_out
        d_weights = (d_out @ parts.value[:, :, tile].transpose(-1, -2)) * keep
        d_shifted = weights * (d_weights - delta)
        if d_bias is not None:
            d_bias[..., tile] = d_shifted
        d_scores = d_shifted * problem.scale
        if problem.softcap is not None and fault != "no-softcap-derivative":
            d_scores = d_scores * (1 - torch.tanh(scaled / problem.softcap) ** 2)
        d_key[:, :, tile] = d_scores.transpose(-1, -2) @ parts.query
        contribution = d_scores @ parts.key[:, :, tile]
        d_query = contribution if fault == "dq-of-last-tile" else d_query + contribution
        if fault == "dk-dv-swapped" and number == 0 and d_key.shape == d_value.shape:
            d_key[:, :, tile], d_value[:, :, tile] = (
                d_value[:, :, tile].clone(),
                d_key[:, :, tile].clone(),
            )
    d_sinks = None
    if problem.sinks is not None:
        sinks = problem.sinks.detach().to(out.dtype).view(1, -1, 1, 1)
        taken = torch.exp(sinks - shift)
        sign = 1.0 if fault == "sink-gradient-sign" else -1.0
        d_sinks = (sign * (taken * delta).sum((0, 2, 3))).to(problem.sinks.dtype)
    return d_query, d_key, d_value, d_bias, d_sinks


def _tile_of(keep: Tensor, tile: slice) -> Tensor:
    return keep[..., tile] if keep.dim() else keep


def _sum_over_group(gradient: Tensor, tensor: Tensor, fault: str | None) -> Tensor:
    heads = tensor.shape[1]
    if heads and gradient.shape[1] != heads:
        if fault == "heads-interleaved":
            gradient = gradient.unflatten(1, (-1, heads)).sum(1)
        else:
            gradient = gradient.unflatten(1, (heads, -1)).sum(2)
    return gradient.to(tensor.dtype)


def _bias_gradient(d_bias: Tensor, shape: tuple[int, ...], fault: str | None) -> Tensor:
    """`d_bias` (B, Hq, Lq, Lk) summed to the bias's four dimensions."""
    if fault == "bias-gradient-of-one":
        for axis, size in enumerate(shape):
            d_bias = d_bias.narrow(axis, 0, min(size, d_bias.shape[axis]))
        return d_bias
    return d_bias.sum_to_size(shape)


def _halved(tensor: Tensor) -> Tensor:
    """Through bfloat16, which has float32's range and 8 bits."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)
