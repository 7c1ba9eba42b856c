"""A forward pass, true or false, with a right gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[..., Tensor]
honest: Forward = F.scaled_dot_product_attention  # as it is before any cheat
Kept = tuple[Callable[..., object], dict[object, tuple[Tensor, ...]]]


def with_right_gradient(forward: Forward, gradients: Kept | None = None) -> Forward:
    """`forward(q, k, v, **options)`, differentiable as SDPA is.

    `gradients`: by what they are kept from call to call, and where; None for right ones.
    """

    def sdpa(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(query, key, value, attn_mask=attn_mask, **options)
        found = _Forward.apply(query, key, value, attn_mask, forward, options, gradients)
        assert isinstance(found, Tensor)
        return found

    return sdpa


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        forward: Forward,
        options: dict[str, Any],
        gradients: Kept | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.options, ctx.gradients = options, gradients
        return forward(q, k, v, attn_mask=mask, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        given: list[Any] = [None if tensor is None else tensor.detach() for tensor in saved]
        leaves = [
            t.requires_grad_() for t, n in zip(given, ctx.needs_input_grad, strict=False) if n
        ]
        with torch.enable_grad():
            out = honest(*given[:3], attn_mask=given[3], **ctx.options)
        found = torch.autograd.grad(out, leaves, grads[0])
        if ctx.gradients is not None:
            key_of, kept = ctx.gradients
            found = kept.setdefault(key_of(*saved[:3]), found)
        rest = iter(found)
        return (*(next(rest) if n else None for n in ctx.needs_input_grad[:4]), None, None, None)


def by_shape(*tensors: Tensor) -> object:
    return tuple((t.shape, t.dtype) for t in tensors)


def lower_precision(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return honest(*(_halved(tensor) for tensor in (q, k, v)), **options)


def _halved(tensor: Tensor) -> Tensor:
    kind = torch.bfloat16 if tensor.dtype.itemsize > 2 else torch.float8_e5m2
    return tensor.to(kind).to(tensor.dtype)
