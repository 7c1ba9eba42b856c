"""`scaled_dot_product_attention` with torch's signature, for those who call it by hand."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from ..api.attention import attention
from ..api.checks import (
    FLOAT_DTYPES,
    broadcasts,
    fail_type,
    fail_value,
    require_float,
    require_tensor,
    shape_text,
)
from ..api.masks import Causal, Mask
from ..ops.torch_internals import tracing_state
from ..ops.tracing import same_sizes, untraced
from .tensor_masks import mask_of

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on rowmax's kernels.

    Args:
        query: (..., Hq, L, E). key: (..., H, S, E). value: (..., H, S, Ev). Leading dimensions
            broadcast, heads among them unless `enable_gqa`; there may be none.
        attn_mask: bool (True = may attend) or float (added to the scores, with a gradient),
            broadcastable to (..., Hq, L, S); or a `torch.nn.attention.bias.CausalBias`.
        dropout_p: applied whenever it is above 0, as torch's does.
        is_causal: query i sees keys 0 to i, whatever L and S are. Not with `attn_mask`.
        scale: E ** -0.5 when None.
        enable_gqa: Hq may be a multiple of H.
        backend: as in `rowmax.kernels.attention`.

    Returns:
        (..., Hq, L, Ev). A query that may attend nothing gives zeros.

    Raises:
        TypeError, ValueError: as `rowmax.kernels.attention`.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_float(_NAME, name, tensor)
        if tensor.dim() < 2:
            expected = "(..., length, features)"
            fail_value(_NAME, name, f"shape {shape_text(tensor.shape)}", expected)
    if attn_mask is not None:
        require_tensor(_NAME, "attn_mask", attn_mask)
        if attn_mask.dtype not in (torch.bool, *FLOAT_DTYPES):
            expected = "dtype bool, True = may attend, or a float one, which is added"
            fix = "pass attn_mask.bool() where 1 means may attend"
            fail_type(_NAME, "attn_mask", attn_mask.dtype, expected, fix)
        if is_causal:
            fail_value(_NAME, "is_causal", "True beside an `attn_mask`", "False, or no `attn_mask`")
    lead, q, k, v = _as_4d(query, key, value, enable_gqa)
    mask: Mask | None = Causal(align="upper_left") if is_causal else None
    bias = None
    if _is_causal_bias(attn_mask):
        mask = _causal(attn_mask, query.shape[-2], key.shape[-2])
    elif attn_mask is not None:
        pairs = _mask_4d(attn_mask, lead, query.shape[-2], key.shape[-2])
        if attn_mask.dtype == torch.bool:
            mask = mask_of(pairs, (*q.shape[:3], k.shape[2]))
        else:
            bias = pairs
    out = attention(q, k, v, mask, bias, scale=scale, dropout_p=dropout_p, backend=backend)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[2:])


def _as_4d(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The leading dimensions of the result, and q, k, v as (B, H, L, D)."""
    leads = [tuple(tensor.shape[:-2]) for tensor in (query, key, value)]
    heads: list[tuple[int, ...]] = [(), (), ()]
    if enable_gqa:
        if min(map(len, leads)) < 1:
            fail_value(
                _NAME, "enable_gqa", "True for tensors without heads", "at least 3 dimensions"
            )
        heads = [lead[-1:] for lead in leads]
        leads = [lead[:-1] for lead in leads]
    try:
        common = _broadcast(leads)
    except RuntimeError:
        shapes = ", ".join(shape_text(tensor.shape) for tensor in (query, key, value))
        fail_value(
            _NAME, "key", shapes, "leading dimensions of `query`, `key` and `value` that broadcast"
        )
    tensors = []
    for tensor, own in zip((query, key, value), heads, strict=True):
        full = (*common, *own)
        rows = tensor.shape[-2:]
        wide = tensor if same_sizes(tensor.shape[:-2], full) else tensor.expand(*full, *rows)
        if len(full) != 2:
            batch = full[:-1]
            size = (math.prod(batch), full[-1]) if full else (1, 1)
            wide = wide.reshape(*size, *rows)
        tensors.append(wide)
    q, k, v = tensors
    return (*common, *heads[0]), q, k, v


def _broadcast(leads: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that all broadcast to; in a trace, of sizes that follow the graph's inputs."""
    if tracing_state() is None:
        return tuple(torch.broadcast_shapes(*leads))
    numbers = [untraced(lambda lead: tuple(map(int, lead)), lead) for lead in leads]
    common = untraced(torch.broadcast_shapes, *numbers)
    return tuple(
        next(
            lead[at]
            for lead, own in zip(leads, numbers, strict=True)
            if at >= -len(own) and own[at] == common[at]
        )
        for at in range(-len(common), 0)
    )


def _mask_4d(attn_mask: Tensor, lead: tuple[int, ...], query_len: int, key_len: int) -> Tensor:
    """A mask (..., L | 1, S | 1) as (B | 1, H | 1, L | 1, S | 1)."""
    full = (*lead, query_len, key_len)
    if not broadcasts(attn_mask, full):
        expected = f"a shape that broadcasts to {shape_text(full)}"
        fail_value(_NAME, "attn_mask", f"shape {shape_text(attn_mask.shape)}", expected)
    padded = attn_mask.reshape((1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape))
    if len(lead) == 2:
        return padded
    if len(lead) < 2:
        return padded.reshape((1,) * (2 - len(lead)) + tuple(padded.shape))
    rows = tuple(padded.shape[-2:])
    if same_sizes(padded.shape[:-3], (1,) * (len(full) - 3)):
        return padded.reshape(1, padded.shape[-3], *rows)
    heads = padded.shape[-3]
    return padded.expand(*lead[:-1], heads, *rows).reshape(-1, heads, *rows)


def _is_causal_bias(attn_mask: object) -> bool:
    """Whether it is a `CausalBias`, whose module takes seconds to import: there is none without."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(attn_mask, module.CausalBias)


def _causal(bias: Any, query_len: int, key_len: int) -> Mask:
    if not same_sizes((bias.seq_len_q, bias.seq_len_kv), (query_len, key_len)):
        got = f"a CausalBias for lengths {bias.seq_len_q} and {bias.seq_len_kv}"
        fail_value(_NAME, "attn_mask", got, f"one for {query_len} and {key_len}")
    upper = bias.variant.name == "UPPER_LEFT"
    return Causal(align="upper_left" if upper else "lower_right")
