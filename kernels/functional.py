"""The public functions: each checks its arguments once, before any work, and calls one op.

Order of an attention: scores = scale * q @ k^T; softcap; bias; mask; softmax (with sinks);
dropout; @ v ('Attention Is All You Need', equation 1, with what has been added to it since).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NoReturn, overload

import torch
from torch import Tensor

from . import dispatch, ops
from .biases import ALiBi
from .checks import (
    FLOAT_DTYPES,
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
    shape_text,
)
from .layout import statistics_dtype
from .masks import NO_MASK, Mask, as_mask, structure_of
from .problem import (
    AddLayerNormProblem,
    AttentionProblem,
    LayerNormProblem,
    RMSNormProblem,
    SoftmaxProblem,
)
from .tracing import same_sizes, untraced


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
        plain = ops.plain_attention(q, k, v, mask, scale, backend)
        if plain is not None:
            return plain
    problem = attention_problem(
        q, k, v, mask, bias, scale, softcap, dropout_p, seed, sinks, draw_seed=True
    )
    if backend != "auto":
        dispatch.check_name("attention", backend)
    if return_weights or weight_heads is not None or weight_rows is not None:
        limits = (problem.shape[1], problem.shape[2]) if return_weights else None
        heads, rows = require_choice("attention", limits, weight_heads, weight_rows)
    out, lse = ops.attention(problem, backend, return_lse)
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
) -> str:
    """Which backend `attention` with these arguments would take, and why not the others."""
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
    if torch._C._is_any_autocast_enabled():
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require_float("attention", name, tensor)
        q, k, v = autocast(q, k, v)
    traced = torch._C._get_tracing_state() is not None
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
        drawn = _seed("attention", seed, dropout_p, "q", q)
    structure = NO_MASK
    if mask is not None:
        structure = structure_of(as_mask("attention", mask), shape, q)
    # in the order of the fields: naming them would cost as much as a check
    return AttentionProblem(
        *(q, k, v, bias, slopes, offset, sinks, structure, scale, softcap, dropout_p, drawn)
    )


def masked_softmax(
    scores: Tensor,
    mask: Mask | Tensor | None = None,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * scores) over the last dimension, over the positions that `mask` allows.

    Args:
        scores: (B, H, Lq, Lk), or fewer leading dimensions (taken as 1).
        mask: as in `attention`; a row that allows nothing gives zeros.
        scale: multiplies the scores.

    Returns:
        weights, shape and dtype of scores; statistics in float32 or wider.
    """
    require_float("masked_softmax", "scores", scores)
    if not 1 <= scores.dim() <= 4:
        fail_value(
            "masked_softmax", "scores", f"shape {shape_text(scores.shape)}", "1 to 4 dimensions"
        )
    scale = require_number("masked_softmax", "scale", scale)
    view = scores
    if scores.dim() == 3:
        view = scores.unsqueeze(1)
    elif scores.dim() < 3:
        view = scores.reshape((1,) * (4 - scores.dim()) + tuple(scores.shape))
    batch, heads, query_len, key_len = view.shape
    structure = structure_of(
        as_mask("masked_softmax", mask), (batch, heads, query_len, key_len), scores
    )
    weights = ops.masked_softmax(
        SoftmaxProblem(view, structure, scale),
        dispatch.check_name("masked_softmax", backend),
    )
    return weights.view(scores.shape)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al. 2016, equation 4).

    Args:
        x: (..., N) float, any strides. weight, bias: (N,) or None.
        eps: added to the (biased) variance.

    Returns:
        (..., N) in x's dtype; statistics in float32 or wider.
    """
    plain = ops.plain_norm(x, weight, bias, eps, backend, centred=True)
    if plain is not None:
        return plain
    eps = _check_norm("layer_norm", x, eps, weight=weight, bias=bias)
    problem = LayerNormProblem(x, weight, bias, eps)
    return ops.layer_norm(problem, dispatch.check_name("layer_norm", backend))


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The Transformer's "Add & Normalize" in one pass: layer norm of residual + dropout(x).

    Args:
        x: (..., N), the sub-layer's output. residual: same shape, dtype and device; under
            torch.autocast, where a sub-layer's output may be narrower, both take the wider dtype.
        weight, bias: (N,) or None. eps: added to the variance.
        dropout_p, seed: as in `attention`; Philox of (seed, row, column).

    Returns:
        (normalised, sum), both (..., N) in x's dtype, sum = residual + dropout(x).
    """
    if torch._C._is_any_autocast_enabled():
        require_float("add_layer_norm", "x", x)
        require_float("add_layer_norm", "residual", residual)
        if _autocasts(x.device.type):
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    eps = _check_norm("add_layer_norm", x, eps, weight=weight, bias=bias)
    require_float("add_layer_norm", "residual", residual)
    require_like("add_layer_norm", "residual", residual, "x", x)
    if not same_sizes(residual.shape, x.shape):
        fail_value(
            "add_layer_norm",
            "residual",
            f"shape {shape_text(residual.shape)}",
            f"{shape_text(x.shape)}, the shape of `x`",
        )
    dropout_p = require_probability("add_layer_norm", "dropout_p", dropout_p)
    problem = AddLayerNormProblem(
        x,
        residual,
        weight,
        bias,
        eps,
        dropout_p,
        _seed("add_layer_norm", seed, dropout_p, "x", x),
    )
    return ops.add_layer_norm(problem, dispatch.check_name("add_layer_norm", backend))


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang & Sennrich 2019, equation 4).

    Args:
        x: (..., N) float, any strides. weight: (N,) or None. eps: added to the mean square.

    Returns:
        (..., N) in x's dtype; the mean square in float32 or wider.
    """
    plain = ops.plain_norm(x, weight, None, eps, backend, centred=False)
    if plain is not None:
        return plain
    eps = _check_norm("rms_norm", x, eps, weight=weight)
    problem = RMSNormProblem(x, weight, eps)
    return ops.rms_norm(problem, dispatch.check_name("rms_norm", backend))


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
            fail_value("attention", name, f"shape {shape_text(tensor.shape)}", dims)
        require_like("attention", name, tensor, "q", q)
    batch, query_heads, _, head_dim = q.shape
    key_heads, key_len = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != head_dim:
        fail_value(
            "attention",
            "k",
            f"shape {shape_text(k.shape)}",
            f"(B, Hkv, Lk, D) with B = {batch} and D = {head_dim}, as `q`",
        )
    if tuple(v.shape[:3]) != tuple(k.shape[:3]):
        fail_value(
            "attention",
            "v",
            f"shape {shape_text(v.shape)}",
            f"({batch}, {key_heads}, {key_len}, Dv), as `k`",
        )
    fail_value(
        "attention",
        "k",
        f"{key_heads} heads",
        f"a number of heads that divides the {query_heads} of `q`",
    )


def _check_bias(bias: Tensor, shape: tuple[int, int, int, int], q: Tensor) -> Tensor:
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:
        fail_type("attention", "bias", "dtype bool", "a float tensor (pass bool ones as `mask`)")
    require_float("attention", "bias", bias)
    require_device("attention", "bias", bias, "q", q)
    return require_broadcastable("attention", "bias", bias, shape, "(B, Hq, Lq, Lk)")


def _check_norm(function: str, x: Tensor, eps: float, **parameters: Tensor | None) -> float:
    """eps as a float, all arguments checked."""
    require_float(function, "x", x)
    if x.dim() == 0:
        fail_value(function, "x", "a 0-d tensor", "shape (..., N)")
    eps = require_number(function, "eps", eps)
    if eps < 0:
        fail_value(function, "eps", eps, "a finite number >= 0")
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        require_float(function, name, parameter)
        require_device(function, name, parameter, "x", x)
        if not same_sizes(parameter.shape, x.shape[-1:]):
            fail_value(
                function, name, f"shape {shape_text(parameter.shape)}", f"(N,) = ({x.shape[-1]},)"
            )
    return eps


def _seed(
    function: str, seed: int | Tensor | None, dropout_p: float, other: str, like: Tensor
) -> Tensor | None:
    """A 0-d int64 tensor where dropout needs one; a tensor so that a traced graph can draw it.

    It lies where `like` does: a CUDA graph then draws anew at each replay, and nobody waits for it.
    """
    if seed is not None and not isinstance(seed, int | Tensor):
        fail_type(function, "seed", type(seed).__name__, "an int, a 0-d int64 tensor or None")
    if isinstance(seed, Tensor):
        require_tensor(function, "seed", seed)
        if seed.dtype != torch.int64 or seed.dim() != 0:
            got = f"{seed.dtype} of shape {shape_text(seed.shape)}"
            fail_type(function, "seed", got, "a 0-d int64 tensor")
        if seed.device.type != "cpu":
            require_device(function, "seed", seed, other, like)
    if dropout_p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)
    if not -(2**63) <= seed < 2**63:
        fail_value(function, "seed", seed, "an int of 64 bits")
    return torch.full((), seed, dtype=torch.int64, device=like.device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, attention runs in the autocast dtype, as torch's own does."""
    device_type = tensors[0].device.type
    if not _autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
    )


def _autocasts(device_type: str) -> bool:
    """Whether torch.autocast is on for the device; some, "meta" among them, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
