"""Attention: arguments are checked once, before any work, and one op is called.

scores = scale * q @ k^T; softcap; bias; mask; softmax (with sinks); dropout; @ v ('Attention Is All
You Need', equation 1, with what has been added to it since), in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn, overload

import torch
from torch import Tensor

from ..backends import dispatch
from ..ops import operators
from ..ops.layout import statistics_dtype
from ..ops.problem import AttentionProblem
from ..ops.torch_internals import any_autocast_enabled, tracing_state
from ..ops.tracing import same_sizes, untraced
from .biases import ALiBi
from .checks import (
    FLOAT_DTYPES,
    autocast,
    fail_keywords,
    fail_type,
    fail_value,
    require_broadcastable,
    require_choice,
    require_device,
    require_float,
    require_like,
    require_number,
    require_probability,
    require_tensor,
    seed_tensor,
    shape_text,
)
from .masks import NO_MASK, Mask, as_mask, structure_of


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    *,
    return_weights: Literal[True],
    weight_heads: Sequence[int] | None = None,
    weight_rows: Sequence[int] | None = None,
) -> tuple[Tensor, ...]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    *,
    return_weights: bool = False,
    weight_heads: Sequence[int] | None = None,
    weight_rows: Sequence[int] | None = None,
    **unknown: object,
) -> Tensor | tuple[Tensor, ...]:
    """Masked-softmax attention, fused, with gradients for q, k, v, a bias tensor and sinks.

    Args:
        q: (B, Hq, Lq, D), float64, float32, bfloat16 or float16, any strides.
        k: (B, Hkv, Lk, D), dtype and device of q; Hq must be a multiple of Hkv (GQA, MQA).
        v: (B, Hkv, Lk, Dv).
        mask: None, a bool tensor broadcastable to (B, Hq, Lq, Lk) in which True = may attend, or
            mask objects joined by `&` (`Causal`, `Window`, `KeyLengths`, ...).
        bias: float tensor broadcastable to (B, Hq, Lq, Lk), added to the scaled scores, with a
            gradient; -inf in it masks. Or `ALiBi(slopes)`.
        scale: multiplies q @ k^T; D ** -0.5 when None.
        softcap: c > 0 turns a score s into c * tanh(s / c), before bias and mask.
        dropout_p: probability in [0, 1] that a weight is dropped; kept ones grow by 1 / (1 - p).
        seed: decides which weights drop (Philox4x32-10 of seed, batch, head, query, key): an int,
            a 0-d int64 tensor, or None to draw one from the default generator of q's device.
        sinks: (Hq,), one learnable logit a head that takes probability and gives no value.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: "auto", or one of "numba", "native", "reference", "triton"; see `explain`.
        return_weights: also return the weights, before dropout, which no fused kernel writes: for
            looking at some of them. They are computed apart, and out is the same as without.
        weight_heads, weight_rows: the query heads and the queries whose weights to return, in this
            order; all when None. Memory is that of the weights returned.

    Returns:
        out (B, Hq, Lq, Dv) in q's dtype; then with `return_lse` lse (B, Hq, Lq) in float32
        (float64 for float64 inputs); then with `return_weights` weights (B, heads, rows, Lk) in q's
        dtype, with a gradient. A row that may attend nothing gives out = 0, lse = -inf and
        no gradient; keys that no query may attend are never read, whatever they hold.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or option; names the argument.
        RuntimeError: a named backend that cannot run here or cannot do this; says why.
    """
    if unknown:
        fail_keywords("attention", unknown)
    if (
        bias is None
        and softcap is None
        and type(dropout_p) is float
        and dropout_p == 0.0
        and seed is None
        and sinks is None
        and not (return_lse or return_weights)
        and weight_heads is None
        and weight_rows is None
    ):
        out = operators.fast_path_attention(q, k, v, mask, scale, backend)
        if out is not None:
            return out
    problem = attention_problem(
        q, k, v, mask, bias, scale, softcap, dropout_p, seed, sinks, draw_seed=True
    )
    if backend != "auto":
        dispatch.check_name("attention", backend)
    if return_weights or weight_heads is not None or weight_rows is not None:
        limits = (problem.shape[1], problem.shape[2]) if return_weights else None
        heads, rows = require_choice("attention", limits, weight_heads, weight_rows)
    out, lse = operators.attention(problem, backend, return_lse)
    if not (return_lse or return_weights):
        return out
    result: tuple[Tensor, ...] = (out,)
    if return_lse and lse is not None:
        result = (out, lse.to(statistics_dtype(out.dtype)))
    if return_weights:
        result = (*result, dispatch.attention_weights(problem, heads, rows))
    return result


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sinks: Tensor | None = None,
    **unknown: object,
) -> str:
    """Which backend `attention` with these arguments would take, and why not the others."""
    if unknown:
        fail_keywords("explain", unknown)
    problem = attention_problem(
        q, k, v, mask, bias, scale, softcap, dropout_p, seed, sinks, draw_seed=False
    )
    return dispatch.explain(problem)


def attention_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    bias: Tensor | ALiBi | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    sinks: Tensor | None,
    *,
    draw_seed: bool,
) -> AttentionProblem:
    """The checked, canonical form of `attention`'s arguments.

    What most calls pass is recognised at once: this function's time is that of every call.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require_tensor("attention", name, tensor)
    if any_autocast_enabled():
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require_float("attention", name, tensor)
        q, k, v = autocast(q, k, v)
    traced = tracing_state() is not None
    shape = _traced_shape(q, k, v) if traced else _check_qkv(q, k, v)
    slopes = offset = None
    if bias is not None:
        if isinstance(bias, ALiBi):
            slopes, offset = bias.parameters(shape, q)
            bias = None
        else:
            bias = _check_bias(bias, shape, q)
    if softcap is not None:
        softcap = require_number("attention", "softcap", softcap)
        if softcap <= 0:
            fail_value("attention", "softcap", softcap, "a finite number > 0, or None")
    if scale is None:
        head_dim = untraced(q.size, 3) if traced else q.shape[3]
        scale = float(head_dim) ** -0.5 if head_dim > 0 else 1.0
    else:
        scale = require_number("attention", "scale", scale)
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = require_probability("attention", "dropout_p", dropout_p)
    if sinks is not None:
        require_float("attention", "sinks", sinks)
        require_device("attention", "sinks", sinks, "q", q)
        if not same_sizes(sinks.shape, shape[1:2]):
            fail_value(
                "attention", "sinks", f"shape {shape_text(sinks.shape)}", f"(Hq,) = ({shape[1]},)"
            )
    drawn = None
    if draw_seed and not (seed is None and dropout_p == 0.0):
        drawn = seed_tensor("attention", seed, dropout_p, "q", q)
    structure = NO_MASK
    if mask is not None:
        structure = structure_of(as_mask("attention", mask), shape, q)
    # in the order of the fields: naming them would cost as much as a check
    return AttentionProblem(
        *(q, k, v, bias, slopes, offset, sinks, structure, scale, softcap, dropout_p, drawn)
    )


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """(B, Hq, Lq, Lk) of tensors that fit each other."""
    try:
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    except RuntimeError:  # a nested tensor has none
        _explain_qkv(q, k, v)
    if len(q_shape) == len(k_shape) == len(v_shape) == 4:
        batch, query_heads, query_len, head_dim = q_shape
        key_batch, key_heads, key_len, key_dim = k_shape
        value_batch, value_heads, value_len, _ = v_shape
        if (
            q.dtype in FLOAT_DTYPES
            and q.dtype == k.dtype == v.dtype
            and q.layout is k.layout is v.layout is torch.strided
            and q.device == k.device == v.device
            and batch == key_batch == value_batch
            and head_dim == key_dim
            and key_heads == value_heads
            and key_len == value_len
            and (query_heads == key_heads or (key_heads != 0 and query_heads % key_heads == 0))
        ):
            return batch, query_heads, query_len, key_len
    return _explain_qkv(q, k, v)


def _traced_shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """The same as sizes that follow the inputs of a graph by torch.jit.trace."""
    untraced(_check_qkv, q, k, v)
    batch, heads, query_len, _ = q.shape
    return batch, heads, query_len, k.shape[2]


def _explain_qkv(q: Tensor, k: Tensor, v: Tensor) -> NoReturn:
    """Says which of the conditions of `_check_qkv` fails first."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_float("attention", name, tensor)
    for name, tensor, dims in (
        ("q", q, "(B, Hq, Lq, D)"),
        ("k", k, "(B, Hkv, Lk, D)"),
        ("v", v, "(B, Hkv, Lk, Dv)"),
    ):
        if tensor.dim() != 4:
            fixes = {
                2: f"pass {name}[None, None] for one head of one batch element",
                3: f"pass {name}[:, None] where heads are missing, {name}[None] where the batch is",
            }
            got, fix = f"shape {shape_text(tensor.shape)}", fixes.get(tensor.dim(), "")
            fail_value("attention", name, got, dims, fix)
        require_like("attention", name, tensor, "q", q)
    batch, query_heads, _, head_dim = q.shape
    key_heads, key_len = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        expected = f"(B, Hkv, Lk, D) with B = {batch} and D = {head_dim}, as `q`"
        only = k.shape[0] == 1 != batch and k.shape[3] == head_dim
        fix = f"pass k.expand({batch}, -1, -1, -1) to repeat the only one" if only else ""
        fail_value("attention", "k", f"shape {shape_text(k.shape)}", expected, fix)
    if tuple(v.shape[:3]) != tuple(k.shape[:3]):
        expected = f"({batch}, {key_heads}, {key_len}, Dv), as `k`"
        fail_value("attention", "v", f"shape {shape_text(v.shape)}", expected)
    expected = f"a number of heads that divides the {query_heads} of `q`"
    fix = "if your tensors are (B, L, H, D), pass each one's .transpose(1, 2)"
    fail_value("attention", "k", f"{key_heads} heads", expected, fix)


def _check_bias(bias: Tensor, shape: tuple[int, int, int, int], q: Tensor) -> Tensor:
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:
        fail_type("attention", "bias", "dtype bool", "a float tensor (pass bool ones as `mask`)")
    require_float("attention", "bias", bias)
    require_device("attention", "bias", bias, "q", q)
    return require_broadcastable("attention", "bias", bias, shape, "(B, Hq, Lq, Lk)")
