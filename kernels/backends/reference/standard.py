"""The operators in operations that ONNX has, for torch's exporters.

Where ONNX has an operator of its own for the whole (Attention, LayerNormalization and
RMSNormalization, each from some opset on), torch's function of that meaning stands here and the
exporter decides; all else is MatMul, Softmax, Where and the like. Outputs that only a backward pass
reads are written down all the same; what nobody uses, exporters drop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.layout import statistics_dtype
from ...ops.problem import (
    AddLayerNormProblem,
    AttentionProblem,
    LayerNormProblem,
    RMSNormProblem,
    SoftmaxProblem,
)
from ...ops.torch_internals import tracing_state
from ...ops.tracing import untraced
from . import norms, unfused
from .attention import heads_together, naive_scores


def standard_form(name: str) -> Callable[..., Any] | None:
    """The operator `name` of its flat arguments; None for backward passes, which have none."""
    return _FORMS.get(name)


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = AttentionProblem.from_flat(arguments[:-1])
    _refuse_dropout(problem)
    out, lse = unfused.attention(problem)
    if problem.query_starts is None:
        out = _fused(problem) if _is_plain(problem) else _by_softmax(problem)
    return out, lse


def _is_plain(problem: AttentionProblem) -> bool:
    """Whether it is torch's function with no mask or a causal one: every row attends something.

    Otherwise a row that may attend nothing is to give zeros, where ONNX's operator gives NaN. The
    exporter that traces takes no grouped heads.
    """
    if tracing_state() is not None and heads_together(*problem[:2]) > 1:
        return False
    mask = problem.mask
    if mask.band_upper == 0:
        mask = mask._replace(band_upper=None)
    more = (problem.bias, problem.alibi_slopes, problem.sinks, problem.softcap)
    return all(part is None for part in (*more, *mask))


def _fused(problem: AttentionProblem) -> Tensor:
    query, key, value = problem[:3]
    return F.scaled_dot_product_attention(
        *(query, key, value),
        is_causal=problem.mask.band_upper is not None,
        scale=problem.scale,
        enable_gqa=heads_together(query, key) > 1,
    )


def _by_softmax(problem: AttentionProblem) -> Tensor:
    _, _, value, _, shifted, allowed = naive_scores(problem)
    if problem.sinks is None:
        weights = _softmax(shifted, allowed)
    else:
        sinks = problem.sinks.to(shifted.dtype).view(1, -1, 1, 1).expand(*shifted.shape[:3], 1)
        weights = torch.cat((shifted, sinks), -1).softmax(-1)[..., :-1]
    return (weights @ value).to(problem.value.dtype)


def _softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Of scores that are -inf where not allowed; a row that allows nothing gives zeros."""
    weights = scores.softmax(-1)
    if allowed is None:
        return weights
    return weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def _masked_softmax(*arguments: Any) -> Tensor:
    scores, mask, scale = SoftmaxProblem.from_flat(arguments[:-1])
    scaled = scores.to(statistics_dtype(scores.dtype)) * scale
    allowed = mask.allowed(scores.shape[2], scores.shape[3], scores.device)
    if allowed is not None:
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    return _softmax(scaled, allowed).to(scores.dtype)


def _layer_norm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = LayerNormProblem(*arguments[:-1])
    y, mean, rstd = norms.layer_norm(problem)
    if _of_one_dtype(problem[:3]):
        y = F.layer_norm(problem.x, _columns(problem.x), *problem[1:])
    return y, mean, rstd


def _add_layer_norm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = AddLayerNormProblem(*arguments[:-1])
    _refuse_dropout(problem)
    total = problem.x + problem.residual
    y, mean, rstd = _layer_norm(total, *problem[2:5], None)
    return y, total, mean, rstd


def _rms_norm(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = RMSNormProblem(*arguments[:-1])
    y, rstd = norms.rms_norm(problem)
    # the exporter that traces has no rms_norm
    if tracing_state() is None and _of_one_dtype(problem[:2]):
        y = F.rms_norm(problem.x, _columns(problem.x), *problem[1:])
    return y, rstd


def _of_one_dtype(tensors: tuple[Any, ...]) -> bool:
    return len({tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}) == 1


def _columns(x: Tensor) -> tuple[int]:
    return (untraced(x.size, -1),)


def _refuse_dropout(problem: AttentionProblem | AddLayerNormProblem) -> None:
    if problem.dropout_p > 0.0:
        raise RuntimeError(
            f"{problem.op_name}: `dropout_p`: expected 0 while torch.onnx exports, got "
            f"{problem.dropout_p}: ONNX has no dropout of rowmax's seeds. Call model.eval() first"
        )


_FORMS: dict[str, Callable[..., Any]] = {
    "attention": _attention,
    "masked_softmax": _masked_softmax,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "rms_norm": _rms_norm,
}
