"""The torch operators (namespace `rowmax`) of the public functions: schemas, fakes, registration.

Each op is opaque to torch: forward and backward are one op each, and its implementation asks
`dispatch` for the backend; what comes through torch's dispatcher is checked first, by
`operator_checks.py`. Nothing here computes; nothing here knows a backend. What autograd and
vmap do with an op stands in `autograd.py` and `vmap.py`; what may go past torch's dispatcher is for
`fast_path.py` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..api.masks import NO_MASK, Mask, MaskStructure
from ..backends import dispatch
from ..backends.reference.standard import standard_form
from .autograd import autograd_of, unfused_form
from .fast_path import are_ordinary, nothing_watches
from .layout import empty_heads, saved_lse_dtype, statistics_dtype
from .operator_checks import checked
from .problem import (
    AddLayerNormProblem,
    AttentionProblem,
    LayerNormProblem,
    RMSNormProblem,
    SoftmaxProblem,
)
from .sharding import register_if_loaded
from .tracing import is_exported_to_onnx
from .vmap import vmap_rule

_MASK = (
    "Tensor? dense_mask, Tensor? key_lengths, Tensor? query_lengths, Tensor? query_documents, "
    "Tensor? key_documents, Tensor? band, SymInt? band_lower, SymInt? band_upper"
)
_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, "
    f"Tensor? alibi_offset, Tensor? sinks, {_MASK}, float scale, float? softcap, "
    "float dropout_p, Tensor? seed, SymInt batch_start, Tensor? query_starts, Tensor? key_starts, "
    "SymInt longest_query, SymInt longest_key, str backend"
)
_AND_NORM = "Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? seed, str backend"

_SCHEMAS = {
    "attention": f"({_ATTENTION}) -> (Tensor out, Tensor lse)",
    "attention_backward": (
        f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad, "
        f"bool sinks_grad, {_ATTENTION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "masked_softmax": f"(Tensor scores, {_MASK}, float scale, str backend) -> (Tensor weights)",
    "masked_softmax_backward": (
        "(Tensor grad_weights, Tensor weights, float scale, str backend) -> Tensor"
    ),
    "layer_norm": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend)"
        " -> (Tensor y, Tensor mean, Tensor rstd)"
    ),
    "layer_norm_backward": (
        "(Tensor grad_y, Tensor mean, Tensor rstd, Tensor x, Tensor? weight, Tensor? bias, "
        "float eps, str backend) -> (Tensor, Tensor, Tensor)"
    ),
    "add_layer_norm": (
        f"(Tensor x, Tensor residual, {_AND_NORM})"
        " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)"
    ),
    "add_layer_norm_backward": (
        "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor mean, Tensor rstd, "
        f"{_AND_NORM}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "rms_norm": "(Tensor x, Tensor? weight, float eps, str backend) -> (Tensor y, Tensor rstd)",
    "rms_norm_backward": (
        "(Tensor grad_y, Tensor rstd, Tensor x, Tensor? weight, float eps, str backend)"
        " -> (Tensor, Tensor)"
    ),
}

_library = torch.library.Library("rowmax", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def attention(
    problem: AttentionProblem, backend: str, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out (B, Hq, Lq, Dv), lse (B, Hq, Lq) in `saved_lse_dtype`; lse perhaps, if not asked for."""
    # as `call` would decide, without taking the problem apart and together again
    result: tuple[Tensor, Tensor | None]
    heads_only = _has_heads_only(problem)
    if not (nothing_watches() and are_ordinary(problem[:3] if heads_only else problem.flat())):
        result = through_dispatcher("attention", (*problem.flat(), backend))
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(*problem[:7]):
        if heads_only and not with_lse:
            return _of_heads.apply(problem, backend, *problem[:3]), None
        result = _AUTOGRAD["attention"](_attention, (*problem.flat(), backend))
    else:
        chosen = dispatch.choose(backend, problem)
        result = chosen.attention(problem) if with_lse else (chosen.attention_out(problem), None)
    return result


class _OfHeads(_SingleLevelFunction):
    """What `autograd.py` makes of attention, for query, key and value alone and out alone.

    The general one takes 22 arguments apart and together again, twice, which costs more than all
    the rest of a small call.
    """

    @staticmethod
    def forward(ctx: Any, problem: AttentionProblem, backend: str, *heads: Tensor) -> Tensor:
        out, lse = dispatch.choose(backend, problem).attention(problem)
        ctx.rest, ctx.backend = problem[3:], backend
        ctx.save_for_backward(*heads, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        problem = AttentionProblem(query, key, value, *ctx.rest)
        if (
            torch.is_grad_enabled()
            or not nothing_watches()
            or not are_ordinary((query, key, value, out, lse, grad_out))
        ):
            outputs = (grad_out, None, out, lse, False, False)
            gradients = call("attention_backward", *outputs, *problem.flat(), ctx.backend)
        else:
            gradients = dispatch.choose(ctx.backend, problem).attention_backward(
                problem, grad_out, None, out, lse, False, False
            )
        return None, None, *gradients[:3]


_of_heads: Any = _OfHeads  # torch's stubs know of no `apply` in its base


def fast_path_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, scale: float | None, backend: str
) -> Tensor | None:
    """out of a call that needs no gradient, where the backend takes such a call as it comes.

    None, and nothing done, where it does not, or where anything about the arguments is unusual or
    wrong. To check them and to build a problem takes longer than the whole of such a call.
    """
    if not _on_cpu(q, backend) or not _may_take_fast_path(q, k, v):
        return None
    attend = dispatch.fast_path_attention(backend)
    return None if attend is None else attend(q, k, v, mask, scale)


def fast_path_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
    *,
    subtract_mean: bool,
) -> Tensor | None:
    """y of a layer norm, or of an RMS norm without subtract_mean, as in `fast_path_attention`."""
    if not _on_cpu(x, backend) or not _may_take_fast_path(x, weight, bias):
        return None
    normalise = dispatch.fast_path_norm(backend)
    return None if normalise is None else normalise(x, weight, bias, eps, subtract_mean)


def _on_cpu(tensor: Tensor, backend: str) -> bool:
    """Whether the call is for a backend of the CPU; `backend` is a text, whichever."""
    return type(backend) is str and isinstance(tensor, Tensor) and tensor.is_cpu


def _may_take_fast_path(*tensors: Tensor | None) -> bool:
    """Nothing watches, and nothing wants a gradient."""
    return nothing_watches() and not (
        torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    )


def through_dispatcher(name: str, arguments: tuple[Any, ...]) -> Any:
    if torch._C._get_tracing_state() is not None and is_exported_to_onnx():
        return (standard_form(name) or unfused_form(name))(*arguments)
    if not torch.compiler.is_compiling():
        register_if_loaded()
    return getattr(torch.ops.rowmax, name)(*arguments)


_NO_TENSORS = frozenset((type(None), int, float, MaskStructure))


def _has_heads_only(problem: AttentionProblem) -> bool:
    """Whether query, key and value are all its tensors."""
    mask = problem.mask
    return _NO_TENSORS.issuperset(map(type, problem[3:])) and (
        mask is NO_MASK or _NO_TENSORS.issuperset(map(type, mask))
    )


def masked_softmax(problem: SoftmaxProblem, backend: str) -> Tensor:
    """weights, of the shape of the scores."""
    result: Tensor = call("masked_softmax", *problem.flat(), backend)
    return result


def layer_norm(problem: LayerNormProblem, backend: str) -> Tensor:
    """y (..., N)."""
    result: Tensor = call("layer_norm", *problem, backend)[0]
    return result


def add_layer_norm(problem: AddLayerNormProblem, backend: str) -> tuple[Tensor, Tensor]:
    """y and total = residual + dropout(x), both (..., N)."""
    y, total, _, _ = call("add_layer_norm", *problem, backend)
    return y, total


def rms_norm(problem: RMSNormProblem, backend: str) -> Tensor:
    """y (..., N)."""
    result: Tensor = call("rms_norm", *problem, backend)[0]
    return result


def call(name: str, *arguments: Any) -> Any:
    """The operator `name`; its work at once where nothing that torch's dispatcher serves is on."""
    if not (nothing_watches() and are_ordinary(arguments)):
        return through_dispatcher(name, arguments)
    implementation = _IMPLEMENTATIONS[name]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _AUTOGRAD[name](implementation, arguments)
    return implementation(*arguments)


# --- implementations: pick the backend, call it ---------------------------------------------------


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    problem = AttentionProblem.from_flat(args[:-1])
    return dispatch.choose(args[-1], problem).attention(problem)


def _attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    sinks_grad: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = AttentionProblem.from_flat(args[:-1])
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    d_query, d_key, d_value, d_bias, d_sinks = dispatch.choose(
        args[-1], problem
    ).attention_backward(problem, grad_out, grad_lse, out, lse, bias_grad, sinks_grad)
    # an operator returns tensors
    return (
        *(d_query, d_key, d_value),
        out.new_empty(0) if d_bias is None else d_bias,
        out.new_empty(0) if d_sinks is None else d_sinks,
    )


def _masked_softmax(*args: Any) -> Tensor:
    problem = SoftmaxProblem.from_flat(args[:-1])
    return dispatch.choose(args[-1], problem).masked_softmax(problem)


def _masked_softmax_backward(
    grad_weights: Tensor, weights: Tensor, scale: float, backend: str
) -> Tensor:
    problem = SoftmaxProblem.from_flat((weights, *(None,) * 8, scale))
    return dispatch.choose(backend, problem).masked_softmax_backward(grad_weights, weights, scale)


def _layer_norm(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = LayerNormProblem(*args[:-1])
    return dispatch.choose(args[-1], problem).layer_norm(problem)


def _layer_norm_backward(
    grad_y: Tensor, mean: Tensor, rstd: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem = LayerNormProblem(*args[:-1])
    backend = dispatch.choose(args[-1], problem)
    return backend.layer_norm_backward(problem, grad_y, mean, rstd)


def _add_layer_norm(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = AddLayerNormProblem(*args[:-1])
    return dispatch.choose(args[-1], problem).add_layer_norm(problem)


def _add_layer_norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # the sum says the shape and the dtype of both its terms
    problem = AddLayerNormProblem(total, total, *args[:-1])
    backend = dispatch.choose(args[-1], problem)
    return backend.add_layer_norm_backward(problem, grad_y, grad_total, total, mean, rstd)


def _rms_norm(*args: Any) -> tuple[Tensor, Tensor]:
    problem = RMSNormProblem(*args[:-1])
    return dispatch.choose(args[-1], problem).rms_norm(problem)


def _rms_norm_backward(grad_y: Tensor, rstd: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    problem = RMSNormProblem(*args[:-1])
    return dispatch.choose(args[-1], problem).rms_norm_backward(problem, grad_y, rstd)


# --- fakes: shapes, dtypes and strides without data -----------------------------------------------


def _attention_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, value = args[0], args[2]
    out = empty_heads(query, value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=saved_lse_dtype(query.dtype))


def _attention_backward_fake(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    sinks_grad: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key, value, bias, _, _, sinks = args[:7]
    grads = [empty_heads(tensor, tensor.shape[3]) for tensor in (query, key, value)]
    d_bias = bias.new_empty(bias.shape) if bias_grad else query.new_empty(0)
    d_sinks = sinks.new_empty(sinks.shape) if sinks_grad else query.new_empty(0)
    return grads[0], grads[1], grads[2], d_bias, d_sinks


def _masked_softmax_fake(scores: Tensor, *args: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _masked_softmax_backward_fake(grad_weights: Tensor, weights: Tensor, *args: Any) -> Tensor:
    return weights.new_empty(weights.shape)


def _row_statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=statistics_dtype(x.dtype))


def _parameter_gradient(x: Tensor, parameter: Tensor | None) -> Tensor:
    return x.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)


def _layer_norm_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _row_statistics(x), _row_statistics(x)


def _layer_norm_backward_fake(
    grad_y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _parameter_gradient(x, weight), _parameter_gradient(x, bias)


def _add_layer_norm_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _row_statistics(x), _row_statistics(x)


def _add_layer_norm_backward_fake(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x = total.new_empty(total.shape if dropout_p > 0 else (0,))
    d_weight, d_bias = _parameter_gradient(total, weight), _parameter_gradient(total, bias)
    return d_x, total.new_empty(total.shape), d_weight, d_bias


def _rms_norm_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _row_statistics(x)


def _rms_norm_backward_fake(
    grad_y: Tensor, rstd: Tensor, x: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _parameter_gradient(x, weight)


# --- registration ---------------------------------------------------------------------------------


def _at_autograd(
    operator: torch._ops.OpOverload,
    apply: Callable[..., Any],
    unfused: Callable[..., Any],
    standard: Callable[..., Any],
) -> Callable[..., Any]:
    """The kernel of `operator` at the Autograd key; in forward mode, its unfused form.

    While torch exports to ONNX, its form in operators that ONNX has: an exporter takes a program
    apart down to these, here.

    `torch.library.register_autograd` does the same, but reads the whole schema anew for each
    argument to fill in defaults: 0.2 ms a call for attention's 22 arguments, of which none has one.
    """

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            return unfused(*arguments)
        if is_exported_to_onnx():
            return standard(*arguments)
        register_if_loaded()

        def below(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return apply(below, arguments)
        return below(*arguments)

    return kernel


def _below_autocast(operator: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`operator` with autocast off: else it would narrow the products inside a backend as well."""

    def kernel(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return operator(*args)

    return kernel


# operator -> what computes it, and what says its shapes
_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention, _attention_fake),
    "attention_backward": (_attention_backward, _attention_backward_fake),
    "masked_softmax": (_masked_softmax, _masked_softmax_fake),
    "masked_softmax_backward": (_masked_softmax_backward, _masked_softmax_backward_fake),
    "layer_norm": (_layer_norm, _layer_norm_fake),
    "layer_norm_backward": (_layer_norm_backward, _layer_norm_backward_fake),
    "add_layer_norm": (_add_layer_norm, _add_layer_norm_fake),
    "add_layer_norm_backward": (_add_layer_norm_backward, _add_layer_norm_backward_fake),
    "rms_norm": (_rms_norm, _rms_norm_fake),
    "rms_norm_backward": (_rms_norm_backward, _rms_norm_backward_fake),
}
_IMPLEMENTATIONS = {name: implementation for name, (implementation, _) in _OPERATORS.items()}
_AUTOGRAD: dict[str, Callable[..., Any]] = {}

for _name, (_implementation, _fake) in _OPERATORS.items():
    _operator = getattr(torch.ops.rowmax, _name).default
    _AUTOGRAD[_name] = autograd_of(_name, _operator, call)
    _library.impl(_name, checked(_name, _implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rowmax::{_name}", _fake, lib=_library)
    _unfused = unfused_form(_name)
    _standard = standard_form(_name) or _unfused
    _kernel = _at_autograd(_operator, _AUTOGRAD[_name], _unfused, _standard)
    _library.impl(_name, _kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"rowmax::{_name}", vmap_rule(_name, _operator), lib=_library)
    _library.impl(_name, _below_autocast(_operator, "cpu"), "AutocastCPU")
    _library.impl(_name, _below_autocast(_operator, "cuda"), "AutocastCUDA")
