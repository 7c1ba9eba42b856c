"""Kernels as others write them, each with an interface of its own; FACTOR makes them wrong."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FACTOR = 1.0


def attention_with_few_options(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Neither mask nor scale, and no grouped heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal) * FACTOR


def flash_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, None]:
    """(B, L, H, D), grouped heads without a word, and a second result that is None."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(
        *(q, k, v, None, dropout_p, causal), scale=softmax_scale, enable_gqa=True
    )
    return (out * FACTOR).transpose(1, 2), None


def flash_varlen_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Packed: (tokens, heads, head size)."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max(cu_seqlens_k.diff().tolist(), default=0) == max_seqlen_k
    nothing = 0.0 * (q.sum() + k.sum() + v.sum())  # so that no sequences have gradients, too
    found = [v.new_zeros(0, q.shape[1], v.shape[2]) + nothing]
    starts = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    for a, b, c, d in zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False):
        one, two, three = (part.transpose(0, 1)[None] for part in (q[a:b], k[c:d], v[c:d]))
        groups = q.shape[1] != k.shape[1]
        one = F.scaled_dot_product_attention(
            one, two, three, is_causal=causal, scale=softmax_scale, enable_gqa=groups
        )
        found.append(one[0].transpose(0, 1))
    return torch.cat(found) * FACTOR


def into_out(out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Writes into a tensor that comes first; the scale has no default; no gradients."""
    torch.mul(F.scaled_dot_product_attention(query, key, value, scale=scale), FACTOR, out=out)


def for_transformers(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As AttentionInterface calls it: in (B, H, L, D), out (B, L, H, D)."""
    groups = module.num_key_value_groups
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    causal = module.is_causal if is_causal is None else is_causal
    chosen: dict[str, Any] = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling}
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, **chosen)
    return (out * FACTOR).transpose(1, 2), None


@torch.library.custom_op("rowmax_strangers::attention", mutates_args=())
def custom_attention(q: Tensor, k: Tensor, v: Tensor, sm_scale: float, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=sm_scale, is_causal=causal) * FACTOR


@numba.njit(fastmath=False)  # type: ignore[untyped-decorator, unused-ignore]
def _numba_rms(x: Any, weight: Any, eps: float, out: Any) -> None:
    for row in range(x.shape[0]):
        total = 0.0
        for column in range(x.shape[1]):
            total += x[row, column] * x[row, column]
        scale = 1.0 / np.sqrt(total / x.shape[1] + eps)
        for column in range(x.shape[1]):
            out[row, column] = x[row, column] * scale * weight[column]


def numba_rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    """By numpy arrays, which a tensor that records its history does not give; no gradients."""
    out = torch.empty_like(x)
    _numba_rms(x.numpy(), gamma.numpy(), epsilon, out.numpy())
    return out * FACTOR


@triton.jit
def _triton_softmax(scores, out, rows, columns, height: tl.constexpr, width: tl.constexpr):
    row = tl.program_id(0) * height + tl.arange(0, height)[:, None]
    column = tl.arange(0, width)[None, :]
    inside = (row < rows) & (column < columns)
    found = tl.load(scores + row * columns + column, mask=inside, other=-1e30)
    weights = tl.exp(found - tl.max(found, 1)[:, None])
    tl.store(out + row * columns + column, weights / tl.sum(weights, 1)[:, None], mask=inside)


def triton_softmax(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    assert dim == -1
    x = x.contiguous() if mask is None else x.masked_fill(~mask, -torch.inf)
    out = torch.empty_like(x)
    if x.numel():
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        sizes = 64, triton.next_power_of_2(columns)
        _triton_softmax[(triton.cdiv(rows, 64),)](x, out, rows, columns, *sizes)
    return out * FACTOR


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * FACTOR
