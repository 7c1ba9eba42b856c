"""Attention over packed sequences of different lengths, without padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from . import dispatch, ops
from .biases import ALiBi
from .checks import (
    fail_type,
    fail_value,
    require_float,
    require_probability,
    require_tensor,
    shape_text,
)
from .functional import attention_problem, autocast
from .layout import statistics_dtype
from .masks import Align, Causal, Mask, Window
from .problem import AttentionProblem


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
    dropout_p = require_probability("attention_varlen", "dropout_p", dropout_p)
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)

    q, k, v = autocast(q, k, v)
    problems: list[AttentionProblem] = []
    for b, (rows, columns) in enumerate(zip(pairwise(starts_q), pairwise(starts_k), strict=True)):
        problem = attention_problem(
            _heads_first(q[slice(*rows)]),
            _heads_first(k[slice(*columns)]),
            _heads_first(v[slice(*columns)]),
            mask,
            bias,
            scale,
            softcap,
            dropout_p,
            seed,
            sinks,
            draw_seed=True,
        )
        problems.append(problem._replace(batch_start=b))
    outs = [q.new_empty((0, q.shape[1], v.shape[2]))]
    lse_dtype = statistics_dtype(q.dtype)
    lses = [q.new_empty((q.shape[1], 0), dtype=lse_dtype)]
    for problem in problems:
        out, lse = ops.attention(problem, name)
        outs.append(out.squeeze(0).transpose(0, 1))
        lses.append(lse.squeeze(0).to(lse_dtype))
    joined = torch.cat(outs)
    return (joined, torch.cat(lses, dim=1)) if return_lse else joined


def _heads_first(sequence: Tensor) -> Tensor:
    """(L, H, D) seen as (1, H, L, D)."""
    return sequence.transpose(0, 1).unsqueeze(0)


def _check_positional(mask: object, bias: object) -> None:
    """Masks and biases must speak of positions only: a tensor in them would need packing too."""
    kinds = "None or Causal, Window or their `&`"
    if mask is not None and not isinstance(mask, Mask):
        fail_type("attention_varlen", "mask", type(mask).__name__, kinds)
    for part in () if mask is None else mask.parts():
        if not isinstance(part, Causal | Window):
            fail_type("attention_varlen", "mask", type(part).__name__, kinds)
        _check_align("mask", part.align)
    if bias is not None:
        if not isinstance(bias, ALiBi):
            fail_type("attention_varlen", "bias", type(bias).__name__, "None or ALiBi")
        _check_align("bias", bias.align)


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
