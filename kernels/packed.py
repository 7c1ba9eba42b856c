"""Attention over packed sequences of different lengths, without padding."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from itertools import pairwise
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from . import dispatch, ops
from .biases import ALiBi
from .checks import (
    fail_type,
    fail_value,
    require_float,
    require_tensor,
    shape_text,
)
from .functional import attention_problem
from .layout import statistics_dtype
from .masks import Align, Causal, Mask, Window, offset_of, structure_of

_T = TypeVar("_T", Mask, ALiBi)


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Mask | None = None,
    bias: ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Mask | None = None,
    bias: ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Mask | None = None,
    bias: ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on each of n sequences that stand one after another in packed tensors.

    Args:
        q: (total_q, Hq, D). k: (total_k, Hkv, D). v: (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (n + 1,) ints, the start of each sequence and the total; as in
            flash-attention. Sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        mask, bias: `Causal`, `Window` and `ALiBi`, with "upper_left", "lower_right" or int
            alignments, apply within each sequence.
        The rest: as in `attention`; dropout counts sequence b as batch element b.

    Returns:
        out (total_q, Hq, Dv), and with `return_lse` also lse (Hq, total_q).
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "attention_varlen: torch.jit.trace can't record it, for it reads `cu_seqlens_q` and "
            "`cu_seqlens_k`; expected a call outside of a trace, or `attention` with KeyLengths"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_float("attention_varlen", name, tensor)
        if tensor.dim() != 3:
            got = f"shape {shape_text(tensor.shape)}"
            fail_value("attention_varlen", name, got, "shape (total, H, D)")
    _check_positional(mask, bias)
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = _starts("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    if len(starts_q) != len(starts_k):
        fail_value(
            "attention_varlen",
            "cu_seqlens_k",
            f"{len(starts_k)} entries",
            f"{len(starts_q)}, as `cu_seqlens_q`",
        )
    if v.shape[0] != k.shape[0]:
        fail_value("attention_varlen", "v", f"{v.shape[0]} rows", f"{k.shape[0]}, as `k`")
    name = dispatch.check_name("attention_varlen", backend)
    problem = attention_problem(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        None,
        None,
        scale,
        softcap,
        dropout_p,
        seed,
        sinks,
        draw_seed=True,
    )
    lengths_q, lengths_k = (
        [end - start for start, end in pairwise(starts)] for starts in (starts_q, starts_k)
    )
    shape = (len(lengths_q), q.shape[1], max(lengths_q, default=0), max(lengths_k, default=0))
    like = problem.query
    parts = [_aligned(part, lengths_q, lengths_k, like) for part in _parts(mask)]
    structure = structure_of(functools.reduce(operator.and_, parts) if parts else None, shape, like)
    slopes = slope_offset = None
    if bias is not None:
        slopes, slope_offset = _aligned(bias, lengths_q, lengths_k, like).parameters(shape, like)
    out, lse = ops.attention(
        problem._replace(
            mask=structure,
            alibi_slopes=slopes,
            alibi_offset=slope_offset,
            query_starts=torch.tensor(starts_q, dtype=torch.int64, device=like.device),
            key_starts=torch.tensor(starts_k, dtype=torch.int64, device=like.device),
            longest_query=shape[2],
            longest_key=shape[3],
        ),
        name,
        return_lse,
    )
    joined = out.squeeze(0).transpose(0, 1)
    if return_lse and lse is not None:
        return joined, lse.squeeze(0).to(statistics_dtype(q.dtype))
    return joined


def _heads_first(sequence: Tensor) -> Tensor:
    """(L, H, D) seen as (1, H, L, D)."""
    return sequence.transpose(0, 1).unsqueeze(0)


def _check_positional(mask: object, bias: object) -> None:
    """Masks and biases must speak of positions only: a tensor in them would need packing too."""
    kinds = "None or Causal, Window or their `&`"
    if mask is not None and not isinstance(mask, Mask):
        fail_type("attention_varlen", "mask", type(mask).__name__, kinds)
    for part in _parts(mask):
        if not isinstance(part, Causal | Window):
            fail_type("attention_varlen", "mask", type(part).__name__, kinds)
        _check_align("mask", part.align)
    if bias is not None:
        if not isinstance(bias, ALiBi):
            fail_type("attention_varlen", "bias", type(bias).__name__, "None or ALiBi")
        _check_align("bias", bias.align)


def _parts(mask: Mask | None) -> tuple[Mask, ...]:
    return () if mask is None else mask.parts()


def _aligned(part: _T, lengths_q: list[int], lengths_k: list[int], like: Tensor) -> _T:
    """`part` with an `align` that says of each sequence where its query 0 stands."""
    align = part.align  # type: ignore[attr-defined]
    if align is None:
        for query_len, key_len in zip(lengths_q, lengths_k, strict=True):
            offset_of("attention_varlen", None, (1, 1, query_len, key_len), like)
    if align != "lower_right":
        return part
    offsets = [key_len - query_len for query_len, key_len in zip(lengths_q, lengths_k, strict=True)]
    lower_right = torch.tensor(offsets, dtype=torch.int64, device=like.device)
    return replace(part, align=lower_right)  # type: ignore[type-var]


def _check_align(argument: str, align: Align) -> None:
    if isinstance(align, Tensor):
        expected = '"upper_left", "lower_right" or an int'
        fail_type("attention_varlen", argument, "a tensor as `align`", expected)


def _starts(argument: str, cu_seqlens: Tensor, total: int) -> list[int]:
    require_tensor("attention_varlen", argument, cu_seqlens)
    expected = f"(n + 1,) ints that begin with 0, never fall, and end with {total}"
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        fail_type("attention_varlen", argument, cu_seqlens.dtype, expected)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail_value("attention_varlen", argument, f"shape {shape_text(cu_seqlens.shape)}", expected)
    starts: list[int] = cu_seqlens.tolist()
    falls = any(a > b for a, b in pairwise(starts))
    if starts[0] != 0 or starts[-1] != total or falls:
        fail_value("attention_varlen", argument, starts, expected)
    return starts
