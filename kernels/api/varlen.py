"""Attention over packed sequences of different lengths, without padding."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from ..backends import dispatch
from ..ops import operators
from ..ops.layout import statistics_dtype
from ..ops.torch_internals import assert_async, tracing_state
from .attention import attention_problem
from .biases import ALiBi
from .checks import fail_type, fail_value, require_float, require_tensor, shape_text
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
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on each of n sequences that stand one after another in packed tensors.

    Args:
        q: (total_q, Hq, D). k: (total_k, Hkv, D). v: (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (n + 1,) ints, the start of each sequence and the total; as in
            flash-attention. Sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        mask, bias: `Causal`, `Window` and `ALiBi`, with "upper_left", "lower_right" or int
            alignments, apply within each sequence.
        max_seqlen_q, max_seqlen_k: bounds of the sequences' lengths, both or neither. With them
            nothing of cu_seqlens on a GPU is read: the call does not wait for the device, and a
            CUDA graph may record it. What is not read is not checked: there starts are cut to
            [0, total], rows of out beyond a bound that is too small, or in no sequence, are
            undefined, and no memory outside of the tensors is touched.
        The rest: as in `attention`; dropout counts sequence b as batch element b.

    Returns:
        out (total_q, Hq, Dv), and with `return_lse` also lse (Hq, total_q).
    """
    if tracing_state() is not None:
        raise RuntimeError(
            "attention_varlen: torch.jit.trace can't record it, for it reads `cu_seqlens_q` and "
            "`cu_seqlens_k`; expected a call outside of a trace, or `attention` with KeyLengths"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_float("attention_varlen", name, tensor)
        if tensor.dim() != 3:
            got = f"shape {shape_text(tensor.shape)}"
            fix = "`attention` takes padded batches (B, H, L, D)" if tensor.dim() == 4 else ""
            fail_value("attention_varlen", name, got, "shape (total, H, D)", fix)
    _check_positional(mask, bias)
    if (max_seqlen_q is None) != (max_seqlen_k is None):
        missing = "max_seqlen_q" if max_seqlen_q is None else "max_seqlen_k"
        fail_value("attention_varlen", missing, "None beside the other", "both or neither")
    queries = _sequences("q", cu_seqlens_q, q.shape[0], max_seqlen_q, q)
    keys = _sequences("k", cu_seqlens_k, k.shape[0], max_seqlen_k, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got, expected = (f"{each.shape[0]}" for each in (cu_seqlens_k, cu_seqlens_q))
        expected = f"{expected}, as `cu_seqlens_q`"
        fail_value("attention_varlen", "cu_seqlens_k", f"{got} entries", expected)
    if v.shape[0] != k.shape[0]:
        fail_value("attention_varlen", "v", f"{v.shape[0]} rows", f"{k.shape[0]}, as `k`")
    name = dispatch.check_name("attention_varlen", backend)
    problem = attention_problem(
        *(_heads_first(q), _heads_first(k), _heads_first(v), None, None),
        *(scale, softcap, dropout_p, seed, sinks),
        draw_seed=True,
    )
    shape = (queries.starts.shape[0] - 1, q.shape[1], queries.longest, keys.longest)
    like = problem.query
    same = cu_seqlens_q is cu_seqlens_k
    parts = [_aligned(part, queries, keys, same) for part in _parts(mask)]
    structure = structure_of(functools.reduce(operator.and_, parts) if parts else None, shape, like)
    slopes = slope_offset = None
    if bias is not None:
        slopes, slope_offset = _aligned(bias, queries, keys, same).parameters(shape, like)
    out, lse = operators.attention(
        problem._replace(
            mask=structure,
            alibi_slopes=slopes,
            alibi_offset=slope_offset,
            query_starts=queries.starts,
            key_starts=keys.starts,
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
        fix = "pass bounds by keyword, max_seqlen_q= and max_seqlen_k=" if type(mask) is int else ""
        fail_type("attention_varlen", "mask", type(mask).__name__, kinds, fix)
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


def _aligned(part: _T, queries: _Sequences, keys: _Sequences, same: bool) -> _T:
    """`part` with an `align` that says of each sequence where its query 0 stands.

    `same`: queries and keys have the same lengths, whatever these are.
    """
    align = part.align  # type: ignore[attr-defined]
    if align is None and not same:
        if queries.lengths is None or keys.lengths is None:
            raise ValueError(
                "attention_varlen: `align` is needed where lengths are not read (cu_seqlens on a "
                "GPU, beside `max_seqlen_q`) and `cu_seqlens_q` and `cu_seqlens_k` are two: "
                'expected "upper_left", "lower_right" or an int'
            )
        for query_len, key_len in zip(queries.lengths, keys.lengths, strict=True):
            offset_of("attention_varlen", None, (1, 1, query_len, key_len), queries.starts)
    if align is None:
        return replace(part, align="upper_left")  # type: ignore[type-var]
    if align != "lower_right":
        return part
    return replace(part, align=keys.starts.diff() - queries.starts.diff())  # type: ignore[type-var]


def _check_align(argument: str, align: Align) -> None:
    if isinstance(align, Tensor):
        expected = '"upper_left", "lower_right" or an int'
        fail_type("attention_varlen", argument, "a tensor as `align`", expected)


class _Sequences(NamedTuple):
    starts: Tensor  # (n + 1,) int64
    lengths: list[int] | None  # None where they are not read
    longest: int


def _sequences(
    name: str, cu_seqlens: Tensor, total: int, longest: int | None, like: Tensor
) -> _Sequences:
    """The sequences of `cu_seqlens_{name}` on the device of `like`."""
    argument = f"cu_seqlens_{name}"
    require_tensor("attention_varlen", argument, cu_seqlens)
    expected = f"(n + 1,) ints that begin with 0, never fall, and end with {total}"
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        fail_type(
            "attention_varlen", argument, cu_seqlens.dtype, expected, f"pass {argument}.int()"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        fail_value("attention_varlen", argument, f"shape {shape_text(cu_seqlens.shape)}", expected)
    if longest is not None:
        if not isinstance(longest, int | torch.SymInt) or isinstance(longest, bool):
            kind = type(longest).__name__
            fail_type("attention_varlen", f"max_seqlen_{name}", kind, "an int >= 0, or None")
        if longest < 0:
            fail_value("attention_varlen", f"max_seqlen_{name}", longest, "an int >= 0, or None")
        if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
            starts = cu_seqlens.to(like.device, torch.int64)
            if like.device.type == "cpu":  # kernels there rely on what is said here
                _assert_later(starts, total, longest, argument)
            return _Sequences(starts.clamp(0, total), None, min(longest, total))
    values: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] != 0 or values[-1] != total or any(length < 0 for length in lengths):
        fix = "of lengths, pass F.pad(lengths.cumsum(0), (1, 0))" if sum(values) == total else ""
        fail_value("attention_varlen", argument, values, expected, fix)
    needed = max(lengths, default=0)
    if longest is not None and longest < needed:
        bound = f"at least {needed}, the length of a sequence of `{argument}`"
        fail_value("attention_varlen", f"max_seqlen_{name}", longest, bound)
    starts = torch.tensor(values, dtype=torch.int64, device=like.device)
    return _Sequences(starts, lengths, needed)


def _assert_later(starts: Tensor, total: int, longest: int, argument: str) -> None:
    """Records the checks of a graph's CPU tensor, which has no values yet."""
    lengths = starts.diff()
    right = (starts[0] == 0) & (starts[-1] == total) & ((lengths >= 0) & (lengths <= longest)).all()
    message = f"`{argument}`: falls, does not end with {total}, or passes the bound beside it"
    assert_async(right, f"attention_varlen: {message}")
