"""The torch operators (namespace `rowmax`) of the public functions: schemas, fakes, autograd.

Each op is opaque to torch: forward and backward are one op each, and its implementation asks
`dispatch` for the backend. Nothing here computes; nothing here knows a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .layout import empty_heads, saved_lse_dtype, statistics_dtype
from .problem import (
    AddLayerNormProblem,
    AttentionProblem,
    LayerNormProblem,
    RMSNormProblem,
    SoftmaxProblem,
)

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
_ADD_LAYER_NORM = (
    "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, "
    "Tensor? seed, str backend"
)

_SCHEMAS = {
    "attention": f"({_ATTENTION}) -> (Tensor out, Tensor lse)",
    "attention_backward": (
        f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad, "
        f"bool sinks_grad, {_ATTENTION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "masked_softmax": f"(Tensor scores, {_MASK}, float scale, str backend) -> Tensor",
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
        f"({_ADD_LAYER_NORM}) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)"
    ),
    "add_layer_norm_backward": (
        "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor mean, Tensor rstd, "
        f"{_ADD_LAYER_NORM}) -> (Tensor, Tensor, Tensor, Tensor)"
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


def attention(problem: AttentionProblem, backend: str) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv), lse (B, Hq, Lq) in `saved_lse_dtype`."""
    result: tuple[Tensor, Tensor] = torch.ops.rowmax.attention(*problem.flat(), backend)
    return result


def masked_softmax(problem: SoftmaxProblem, backend: str) -> Tensor:
    """weights, of the shape of the scores."""
    result: Tensor = torch.ops.rowmax.masked_softmax(*problem.flat(), backend)
    return result


def layer_norm(problem: LayerNormProblem, backend: str) -> Tensor:
    """y (..., N)."""
    result: Tensor = torch.ops.rowmax.layer_norm(*problem, backend)[0]
    return result


def add_layer_norm(problem: AddLayerNormProblem, backend: str) -> tuple[Tensor, Tensor]:
    """y and total = residual + dropout(x), both (..., N)."""
    y, total, _, _ = torch.ops.rowmax.add_layer_norm(*problem, backend)
    return y, total


def rms_norm(problem: RMSNormProblem, backend: str) -> Tensor:
    """y (..., N)."""
    result: Tensor = torch.ops.rowmax.rms_norm(*problem, backend)[0]
    return result


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
    return dispatch.choose(args[-1], problem).attention_backward(
        problem, grad_out, grad_lse, out, lse, bias_grad, sinks_grad
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
    problem = AddLayerNormProblem(*args[:-1])
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
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x = x.new_empty(x.shape if dropout_p > 0 else (0,))
    d_weight, d_bias = _parameter_gradient(x, weight), _parameter_gradient(x, bias)
    return d_x, x.new_empty(x.shape), d_weight, d_bias


def _rms_norm_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _row_statistics(x)


def _rms_norm_backward_fake(
    grad_y: Tensor, rstd: Tensor, x: Tensor, weight: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _parameter_gradient(x, weight)


# --- autograd -------------------------------------------------------------------------------------


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, output)


def _attention_autograd(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    inputs, (out, lse) = _saved(ctx)
    if grad_out is None and grad_lse is None:
        return (None,) * len(inputs)
    _, _, _, _, bias_grad, _, _, sinks_grad, *_ = ctx.needs_input_grad  # the key set is first
    d_query, d_key, d_value, d_bias, d_sinks = torch.ops.rowmax.attention_backward(
        grad_out, grad_lse, out, lse, bias_grad, sinks_grad, *inputs
    )
    return (
        d_query,
        d_key,
        d_value,
        d_bias if bias_grad else None,
        None,
        None,
        d_sinks if sinks_grad else None,
        *(None,) * (len(inputs) - 7),
    )


def _masked_softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.scale, ctx.backend = inputs[-2:]


def _masked_softmax_autograd(ctx: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    (weights,) = ctx.saved_tensors
    d_scores = torch.ops.rowmax.masked_softmax_backward(
        grad_weights, weights, ctx.scale, ctx.backend
    )
    return (d_scores, *(None,) * 10)


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output[1:])


def _layer_norm_autograd(
    ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_rstd: Tensor
) -> tuple[Tensor | None, ...]:
    inputs, (mean, rstd) = _saved(ctx)
    d_x, d_weight, d_bias = torch.ops.rowmax.layer_norm_backward(grad_y, mean, rstd, *inputs)
    return d_x, _unless_absent(d_weight, inputs[1]), _unless_absent(d_bias, inputs[2]), None, None


def _add_layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, output[1:])


def _add_layer_norm_autograd(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None, *statistics: Any
) -> tuple[Tensor | None, ...]:
    inputs, (total, mean, rstd) = _saved(ctx)
    if grad_y is None:
        grad_y = torch.zeros_like(total)
    d_x, d_residual, d_weight, d_bias = torch.ops.rowmax.add_layer_norm_backward(
        grad_y, grad_total, total, mean, rstd, *inputs
    )
    dropout_p = inputs[5]
    return (
        d_x if dropout_p > 0 else d_residual,
        d_residual,
        _unless_absent(d_weight, inputs[2]),
        _unless_absent(d_bias, inputs[3]),
        *(None,) * 4,
    )


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1:])


def _rms_norm_autograd(ctx: Any, grad_y: Tensor, grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    inputs, (rstd,) = _saved(ctx)
    d_x, d_weight = torch.ops.rowmax.rms_norm_backward(grad_y, rstd, *inputs)
    return d_x, _unless_absent(d_weight, inputs[1]), None, None


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    """Keep all inputs: tensors as saved tensors, the rest as they are, in one order."""
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.constants = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *outputs)


def _saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
    inputs = [next(tensors) if is_tensor else next(constants) for is_tensor in ctx.is_tensor]
    return inputs, tuple(tensors)


def _unless_absent(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else gradient


def _nothing_saved(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
    """The setup of an op that has no derivative."""


def _no_double_backward(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"rowmax: {name} has no second derivative yet; differentiate the float64 reference "
            "`rowmax.kernels.reference.naive_attention` twice, or torch's own functions"
        )

    return backward


_FORWARD: dict[str, tuple[Callable[..., Any], ...]] = {
    "attention": (_attention, _attention_fake, _attention_setup, _attention_autograd),
    "masked_softmax": (
        _masked_softmax,
        _masked_softmax_fake,
        _masked_softmax_setup,
        _masked_softmax_autograd,
    ),
    "layer_norm": (_layer_norm, _layer_norm_fake, _layer_norm_setup, _layer_norm_autograd),
    "add_layer_norm": (
        _add_layer_norm,
        _add_layer_norm_fake,
        _add_layer_norm_setup,
        _add_layer_norm_autograd,
    ),
    "rms_norm": (_rms_norm, _rms_norm_fake, _rms_norm_setup, _rms_norm_autograd),
}
_BACKWARD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention_backward": (_attention_backward, _attention_backward_fake),
    "masked_softmax_backward": (_masked_softmax_backward, _masked_softmax_backward_fake),
    "layer_norm_backward": (_layer_norm_backward, _layer_norm_backward_fake),
    "add_layer_norm_backward": (_add_layer_norm_backward, _add_layer_norm_backward_fake),
    "rms_norm_backward": (_rms_norm_backward, _rms_norm_backward_fake),
}


def _differentiable(
    operator: torch._ops.OpOverload, setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The kernel of `operator` at the Autograd key.

    `torch.library.register_autograd` does the same, but reads the whole schema anew for each
    argument to fill in defaults: 0.2 ms a call for attention's 22 arguments, of which none has one.
    """

    def below(keyset: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            output = below(keyset, *inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None, *backward(ctx, *grads))

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Function.apply(keyset, *inputs)
        return below(keyset, *inputs)

    return kernel


def _below_autocast(operator: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`operator` with autocast off: else it would narrow the products inside a backend as well."""

    def kernel(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return operator(*args)

    return kernel


for _name, (_implementation, _fake, _setup, _autograd) in _FORWARD.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rowmax::{_name}", _fake, lib=_library)
    _kernel = _differentiable(getattr(torch.ops.rowmax, _name).default, _setup, _autograd)
    _library.impl(_name, _kernel, "Autograd", with_keyset=True)
for _name, (_implementation, _fake) in _BACKWARD.items():
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rowmax::{_name}", _fake, lib=_library)
    _kernel = _differentiable(
        getattr(torch.ops.rowmax, _name).default, _nothing_saved, _no_double_backward(_name)
    )
    _library.impl(_name, _kernel, "Autograd", with_keyset=True)
for _name in _SCHEMAS:
    _operator = getattr(torch.ops.rowmax, _name).default
    _library.impl(_name, _below_autocast(_operator, "cpu"), "AutocastCPU")
    _library.impl(_name, _below_autocast(_operator, "cuda"), "AutocastCUDA")
