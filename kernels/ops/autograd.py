"""What autograd does with each operator: backward, second derivatives and forward mode.

A first gradient is the backend's: one backward operator for each forward one. The derivatives of
that are the formulas of `reference/second_order.py`; and while forward mode is on, the reference
runs in the operator's place, for torch's own operations carry tangents. Both write an attention's
scores out, whatever the backend, and can be differentiated further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..backends import reference
from ..backends.reference import second_order, unfused
from ..backends.reference.norms import keep_factor
from ..backends.reference.second_order import AttentionTangents
from .layout import statistics_dtype
from .problem import (
    AddLayerNormProblem,
    AttentionProblem,
    LayerNormProblem,
    RMSNormProblem,
    SoftmaxProblem,
)

Values = tuple[Any, ...]
Call = Callable[..., Any]


class Rule(NamedTuple):
    """The derivatives of an operator, by the arguments at the positions `differentiable`."""

    differentiable: tuple[int, ...]
    # the tensors that `backward` reads, by their names in the schema; it is given None for others
    saves: tuple[str, ...]
    # (call an operator, arguments, outputs, needed, gradients of the outputs) -> gradients
    backward: Callable[[Call, Values, Values, Sequence[bool], Values], Values]
    # (arguments) -> outputs, in operations of torch that carry tangents
    unfused: Callable[..., Any]


def autograd_of(name: str, operator: torch._ops.OpOverload, call: Call) -> Call:
    """(run, arguments) -> outputs, with the derivatives of `operator`.

    `run(*arguments)` computes the outputs: below autograd in torch's dispatcher, or at once. The
    base class is the one that functorch builds on too: it serves one level of `torch.func.grad`, as
    the derivative of a torch operator does, where the public one wants to serve them all.
    """
    rule = _RULES[name]
    arguments, returns = operator._schema.arguments, operator._schema.returns
    constant_at = [at for at, each in enumerate(arguments) if "Tensor" not in str(each.type)]
    one_output = len(returns) == 1
    nothing = (None, None)

    def saved(tensors: Sequence[Any]) -> list[int]:
        """Where the saved ones stand among arguments or outputs."""
        return [at for at, each in enumerate(tensors) if each.name in rule.saves]

    argument_at, output_at = saved(arguments), saved(returns)
    assert len(argument_at) + len(output_at) == len(rule.saves)
    # of (*saved arguments, *saved outputs, *constants, None): each argument's, and each output's
    pool = [*(("argument", at) for at in argument_at), *(("output", at) for at in output_at)]
    pool += [("argument", at) for at in constant_at]

    def places(kind: str, count: int) -> list[int]:
        return [pool.index((kind, at)) if (kind, at) in pool else len(pool) for at in range(count)]

    arguments_of = _picker(places("argument", len(arguments)))
    outputs_of = _picker(places("output", len(returns)))
    kept_arguments, kept_outputs = _picker(argument_at), _picker(output_at)
    constants_of = _picker(constant_at)

    def forward(ctx: Any, run: Call, arguments: Values, *differentiable: Tensor | None) -> Any:
        if torch._C._are_functorch_transforms_active():
            # autograd has switched itself off for this level: the others go on
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                outputs = run(*arguments)
        else:
            outputs = run(*arguments)
        ctx.set_materialize_grads(False)
        ctx.constants = constants_of(arguments)
        kept = kept_outputs((outputs,) if one_output else outputs)
        ctx.save_for_backward(*kept_arguments(arguments), *kept)
        return outputs

    def backward(ctx: Any, *gradients: Tensor | None) -> Values:
        if all(gradient is None for gradient in gradients):
            return nothing + (None,) * len(rule.differentiable)
        values = (*ctx.saved_tensors, *ctx.constants, None)
        return nothing + rule.backward(
            call, arguments_of(values), outputs_of(values), ctx.needs_input_grad[2:], gradients
        )

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"rowmax_{name}", (_SingleLevelFunction,), methods)

    def apply(run: Call, arguments: Values) -> Any:
        differentiable = [arguments[at] for at in rule.differentiable]
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(run, arguments, *differentiable)
        return function.apply(run, arguments, *differentiable)

    return apply


def _picker(places: Sequence[int]) -> Callable[[Values], Values]:
    """What stands at these places, as a tuple of any length."""
    if len(places) > 1:
        return cast(Callable[[Values], Values], itemgetter(*places))
    return lambda values: tuple(values[at] for at in places)


# --- attention ------------------------------------------------------------------------------------

_ATTENTION_AT = (0, 1, 2, 3, 6)  # query, key, value, bias, sinks


def _attention_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    *_, bias_grad, sinks_grad = needed
    d_query, d_key, d_value, d_bias, d_sinks = call(
        "attention_backward", *gradients, *outputs, bias_grad, sinks_grad, *arguments
    )
    return d_query, d_key, d_value, d_bias if bias_grad else None, d_sinks if sinks_grad else None


def _attention_backward_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    grad_out, grad_lse, problem = _of_backward(arguments)
    of_query, of_key, of_value, of_bias, of_sinks = gradients
    bias_grad, sinks_grad = arguments[4:6]  # what was not asked for is empty
    tangents = AttentionTangents(
        *(of_query, of_key, of_value),
        of_bias if bias_grad else None,
        of_sinks if sinks_grad else None,
    )
    t_out, t_lse = second_order.attention_tangents(problem, tangents)
    return (
        None if grad_out is None else t_out,
        None if grad_lse is None else t_lse,
        *_where_present(
            second_order.attention_second_order(problem, grad_out, grad_lse, tangents), problem
        ),
    )


def _of_backward(arguments: Values) -> tuple[Tensor | None, Tensor | None, AttentionProblem]:
    return arguments[0], arguments[1], AttentionProblem.from_flat(arguments[6:-1])


def _where_present(gradients: Values, problem: AttentionProblem) -> Values:
    d_query, d_key, d_value, d_bias, d_sinks = gradients
    return (
        *(d_query, d_key, d_value),
        None if problem.bias is None else d_bias,
        None if problem.sinks is None else d_sinks,
    )


# --- masked softmax -------------------------------------------------------------------------------


def _masked_softmax_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    return (call("masked_softmax_backward", gradients[0], outputs[0], *arguments[-2:]),)


def _masked_softmax_backward_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    grad_weights, weights, scale, _ = arguments
    return (
        second_order.masked_softmax_tangent(weights, scale, gradients[0]),
        second_order.masked_softmax_second_order(grad_weights, weights, scale, gradients[0]),
    )


# --- norms ----------------------------------------------------------------------------------------


def _layer_norm_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    if gradients[0] is None:
        return None, None, None
    d_x, d_weight, d_bias = call("layer_norm_backward", gradients[0], *outputs[1:], *arguments)
    return d_x, _unless_absent(d_weight, arguments[1]), _unless_absent(d_bias, arguments[2])


def _layer_norm_backward_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    grad_y, _, _, x, weight, bias, eps, _ = arguments
    t_x, t_weight, t_bias = gradients
    t_weight, t_bias = _where_given(t_weight, weight), _where_given(t_bias, bias)
    t_y = second_order.norm_tangents(x, weight, eps, True, t_x, t_weight, t_bias)
    h_x, h_weight = second_order.norm_second_order(x, weight, eps, True, grad_y, t_x, t_weight)
    return t_y, h_x, _unless_absent(h_weight, weight)


def _rms_norm_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    if gradients[0] is None:
        return None, None
    d_x, d_weight = call("rms_norm_backward", gradients[0], outputs[1], *arguments)
    return d_x, _unless_absent(d_weight, arguments[1])


def _rms_norm_backward_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    grad_y, _, x, weight, eps, _ = arguments
    t_x, t_weight = gradients
    t_weight = _where_given(t_weight, weight)
    t_y = second_order.norm_tangents(x, weight, eps, False, t_x, t_weight, None)
    h_x, h_weight = second_order.norm_second_order(x, weight, eps, False, grad_y, t_x, t_weight)
    return t_y, h_x, _unless_absent(h_weight, weight)


def _add_layer_norm_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    grad_y, grad_total, *_ = gradients
    if grad_y is None and grad_total is None:
        return None, None, None, None
    if grad_y is None:
        grad_y = torch.zeros_like(outputs[1])
    d_x, d_residual, d_weight, d_bias = call(
        "add_layer_norm_backward", grad_y, grad_total, *outputs[1:], *arguments[2:]
    )
    return (
        d_x if arguments[5] > 0 else d_residual,
        d_residual,
        _unless_absent(d_weight, arguments[2]),
        _unless_absent(d_bias, arguments[3]),
    )


def _add_layer_norm_backward_backward(
    call: Call, arguments: Values, outputs: Values, needed: Sequence[bool], gradients: Values
) -> Values:
    grad_y, _, total, _, _, weight, bias, eps, dropout_p, *_ = arguments
    t_x, t_residual, t_weight, t_bias = gradients
    t_weight, t_bias = _where_given(t_weight, weight), _where_given(t_bias, bias)
    # without dropout the gradient of x is that of the residual, and the op's own is empty
    t_total = _of_sum(_problem_of_sum(arguments), t_x if dropout_p > 0 else None, t_residual)
    t_y = second_order.norm_tangents(total, weight, eps, True, t_total, t_weight, t_bias)
    h_total, h_weight = second_order.norm_second_order(
        total, weight, eps, True, grad_y, t_total, t_weight
    )
    return t_y, t_total if needed[1] else None, h_total, _unless_absent(h_weight, weight)


def _problem_of_sum(arguments: Values) -> AddLayerNormProblem:
    """The sum, of which a backward pass is a function, says shape and dtype of its terms."""
    total = arguments[2]
    return AddLayerNormProblem(total, total, *arguments[5:-1])


def _of_sum(problem: AddLayerNormProblem, t_x: Tensor | None, t_residual: Tensor | None) -> Tensor:
    """The tangent of residual + dropout(x), in the dtype of the statistics."""
    keep = keep_factor(problem, statistics_dtype(problem.x.dtype))
    t_total = torch.zeros_like(problem.x, dtype=keep.dtype)
    if t_x is not None:
        t_total = t_total + keep * t_x
    return t_total if t_residual is None else t_total + t_residual


def _unless_absent(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else gradient


def _where_given(tangent: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient of an absent parameter is an empty tensor, and so is what arrives for it."""
    return None if parameter is None else tangent


# --- forward mode: the reference, whose operations carry tangents ---------------------------------


def _unfused_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    return unfused.attention(AttentionProblem.from_flat(arguments[:-1]))


def _unfused_attention_backward(*arguments: Any) -> Values:
    grad_out, grad_lse, _, _, bias_grad, sinks_grad, *fields, _ = arguments
    problem = AttentionProblem.from_flat(tuple(fields))
    return unfused.attention_backward(problem, grad_out, grad_lse, bias_grad, sinks_grad)


def _unfused_masked_softmax(*arguments: Any) -> Tensor:
    return reference.masked_softmax(SoftmaxProblem.from_flat(arguments[:-1]))


def _unfused_masked_softmax_backward(*arguments: Any) -> Tensor:
    return reference.masked_softmax_backward(*arguments[:-1])


def _unfused_layer_norm(*arguments: Any) -> Values:
    return reference.layer_norm(LayerNormProblem(*arguments[:-1]))


def _unfused_layer_norm_backward(*arguments: Any) -> Values:
    grad_y, mean, rstd, *fields, _ = arguments
    return reference.layer_norm_backward(LayerNormProblem(*fields), grad_y, mean, rstd)


def _unfused_add_layer_norm(*arguments: Any) -> Values:
    return reference.add_layer_norm(AddLayerNormProblem(*arguments[:-1]))


def _unfused_add_layer_norm_backward(*arguments: Any) -> Values:
    return reference.add_layer_norm_backward(_problem_of_sum(arguments), *arguments[:5])


def _unfused_rms_norm(*arguments: Any) -> Values:
    return reference.rms_norm(RMSNormProblem(*arguments[:-1]))


def _unfused_rms_norm_backward(*arguments: Any) -> Values:
    grad_y, rstd, *fields, _ = arguments
    return reference.rms_norm_backward(RMSNormProblem(*fields), grad_y, rstd)


_ATTENTION_TENSORS = (
    *("query", "key", "value", "bias", "alibi_slopes", "alibi_offset", "sinks", "dense_mask"),
    *("key_lengths", "query_lengths", "query_documents", "key_documents", "band", "seed"),
    *("query_starts", "key_starts"),
)
# Where a formula reads a parameter's dtype alone, it is saved too, as torch's own norms do.
_RULES = {
    "attention": Rule(
        _ATTENTION_AT,
        (*_ATTENTION_TENSORS, "out", "lse"),
        _attention_backward,
        _unfused_attention,
    ),
    "attention_backward": Rule(
        (0, 1, *(6 + at for at in _ATTENTION_AT)),
        ("grad_out", "grad_lse", *_ATTENTION_TENSORS),
        _attention_backward_backward,
        _unfused_attention_backward,
    ),
    "masked_softmax": Rule((0,), ("weights",), _masked_softmax_backward, _unfused_masked_softmax),
    "masked_softmax_backward": Rule(
        (0, 1),
        ("grad_weights", "weights"),
        _masked_softmax_backward_backward,
        _unfused_masked_softmax_backward,
    ),
    "layer_norm": Rule(
        (0, 1, 2),
        ("x", "weight", "bias", "mean", "rstd"),
        _layer_norm_backward,
        _unfused_layer_norm,
    ),
    "layer_norm_backward": Rule(
        (0, 3, 4),
        ("grad_y", "x", "weight", "bias"),
        _layer_norm_backward_backward,
        _unfused_layer_norm_backward,
    ),
    "add_layer_norm": Rule(
        (0, 1, 2, 3),
        ("weight", "bias", "seed", "total", "mean", "rstd"),
        _add_layer_norm_backward,
        _unfused_add_layer_norm,
    ),
    "add_layer_norm_backward": Rule(
        (0, 1, 2, 5),
        ("grad_y", "total", "weight", "bias", "seed"),
        _add_layer_norm_backward_backward,
        _unfused_add_layer_norm_backward,
    ),
    "rms_norm": Rule((0, 1), ("x", "weight", "rstd"), _rms_norm_backward, _unfused_rms_norm),
    "rms_norm_backward": Rule(
        (0, 2, 3),
        ("grad_y", "x", "weight"),
        _rms_norm_backward_backward,
        _unfused_rms_norm_backward,
    ),
}


def unfused_form(name: str) -> Callable[..., Any]:
    """What runs in the place of the operator while forward mode is on, on whatever backend."""
    return _RULES[name].unfused
