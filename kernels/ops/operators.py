"""The torch operators (namespace `rowmax`) of the public functions: entry points and registration.

Each op is opaque to torch: forward and backward are one op each, and its implementation asks
`dispatch` for the backend; what comes through torch's dispatcher is checked first. Nothing here
computes; nothing here knows a backend. An op's own facts stand in `attention.py`, `softmax.py`,
`norms.py` and `cross_entropy.py`; `spec.py`, `operator_checks.py`, `autograd.py`, `vmap.py` and
`sharding.py` make of them what torch asks for. What may go past torch's dispatcher is for
`fast_path.py` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..api.masks import Mask
from ..backends import dispatch
from ..backends.reference.standard import standard_form
from .attention import ATTENTION, ATTENTION_BACKWARD
from .autograd import autograd_of
from .cross_entropy import LINEAR_CROSS_ENTROPY, LINEAR_CROSS_ENTROPY_BACKWARD
from .fast_path import are_ordinary, nothing_watches
from .norms import NORMS
from .operator_checks import checked
from .problem import (
    AddLayerNormProblem,
    AttentionProblem,
    BackwardInputs,
    LayerNormProblem,
    LinearCrossEntropyProblem,
    RMSNormProblem,
    SoftmaxProblem,
)
from .sharding import register_if_loaded, register_when_loaded
from .softmax import MASKED_SOFTMAX, MASKED_SOFTMAX_BACKWARD
from .spec import Operator
from .torch_internals import (
    BelowAutograd,
    OpOverload,
    SingleLevelFunction,
    after_autograd_keyset,
    any_requires_grad,
    forward_mode_is_on,
    tracing_state,
)
from .tracing import is_exported_to_onnx
from .vmap import vmap_rule

OPERATORS = {
    operator.name: operator
    for operator in (
        *(ATTENTION, ATTENTION_BACKWARD, MASKED_SOFTMAX, MASKED_SOFTMAX_BACKWARD),
        *NORMS.values(),
        *(LINEAR_CROSS_ENTROPY, LINEAR_CROSS_ENTROPY_BACKWARD),
    )
}


def attention(
    problem: AttentionProblem, backend: str, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out (B, Hq, Lq, Dv), lse (B, Hq, Lq) in `saved_lse_dtype`; lse perhaps, if not asked for."""
    # as `call` would decide, without taking the problem apart and together again
    result: tuple[Tensor, Tensor | None]
    heads_only = problem.has_heads_only()
    if not (nothing_watches() and are_ordinary(problem[:3] if heads_only else problem.flat())):
        result = through_dispatcher("attention", (*problem.flat(), backend))
    elif torch.is_grad_enabled() and any_requires_grad(*problem[:7]):
        if heads_only and not with_lse:
            return _of_heads.apply(problem, backend, *problem[:3]), None
        arguments = (*problem.flat(), backend)
        result = _AUTOGRAD["attention"](_IMPLEMENTATIONS["attention"], arguments)
    else:
        chosen = dispatch.choose(backend, problem)
        result = chosen.attention(problem) if with_lse else (chosen.attention_out(problem), None)
    return result


class _OfHeads(SingleLevelFunction):
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
        inputs = BackwardInputs(grad_out, None, out, lse)
        if (
            torch.is_grad_enabled()
            or not nothing_watches()
            or not are_ordinary((query, key, value, out, lse, grad_out))
        ):
            gradients = call("attention_backward", *inputs, *problem.flat(), ctx.backend)
        else:
            gradients = dispatch.choose(ctx.backend, problem).attention_backward(problem, inputs)
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
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
    *,
    subtract_mean: bool,
) -> tuple[Tensor, Tensor] | None:
    """y of a layer norm, or of an RMS norm without subtract_mean, and the sum that it is of, as in
    `fast_path_attention`; without a residual there is no sum, and the second is y again."""
    if not _on_cpu(x, backend) or not _may_take_fast_path(x, residual, weight, bias):
        return None
    normalise = dispatch.fast_path_norm(backend)
    return None if normalise is None else normalise(x, residual, weight, bias, eps, subtract_mean)


def _on_cpu(tensor: Tensor, backend: str) -> bool:
    """Whether the call is for a backend of the CPU; `backend` is a text, whichever."""
    return type(backend) is str and isinstance(tensor, Tensor) and tensor.is_cpu


def _may_take_fast_path(*tensors: Tensor | None) -> bool:
    """Nothing watches, and nothing wants a gradient."""
    return nothing_watches() and not (torch.is_grad_enabled() and any_requires_grad(*tensors))


def through_dispatcher(name: str, arguments: tuple[Any, ...]) -> Any:
    if tracing_state() is not None and is_exported_to_onnx():
        return (standard_form(name) or OPERATORS[name].unfused)(*arguments)
    if not torch.compiler.is_compiling():
        register_if_loaded()
    return getattr(torch.ops.rowmax, name)(*arguments)


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


def linear_cross_entropy(problem: LinearCrossEntropyProblem, backend: str) -> Tensor:
    """loss (), in the dtype of statistics."""
    result: Tensor = call("linear_cross_entropy", *problem, backend)[0]
    return result


def call(name: str, *arguments: Any) -> Any:
    """The operator `name`; its work at once where nothing that torch's dispatcher serves is on."""
    if not (nothing_watches() and are_ordinary(arguments)):
        return through_dispatcher(name, arguments)
    implementation = _IMPLEMENTATIONS[name]
    if torch.is_grad_enabled() and any_requires_grad(*arguments):
        return _AUTOGRAD[name](implementation, arguments)
    return implementation(*arguments)


# --- registration ---------------------------------------------------------------------------------


def _implementation(operator: Operator) -> Callable[..., Any]:
    """Picks the backend and calls it; where a result is not present, an empty tensor."""

    def kernel(*arguments: Any) -> Any:
        problem, rest = operator.split(arguments[:-1])
        results = operator.run(dispatch.choose(arguments[-1], problem), problem, *rest)
        if isinstance(results, Tensor):
            return results
        return tuple([problem[0].new_empty(0) if each is None else each for each in results])

    return kernel


def _at_autograd(
    operator: OpOverload,
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
        if forward_mode_is_on():
            return unfused(*arguments)
        if is_exported_to_onnx():
            return standard(*arguments)
        register_if_loaded()

        def below(*arguments: Any) -> Any:
            with BelowAutograd():
                return operator.redispatch(keyset & after_autograd_keyset, *arguments)

        if torch.is_grad_enabled() and any_requires_grad(*arguments):
            return apply(below, arguments)
        return below(*arguments)

    return kernel


def _below_autocast(operator: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`operator` with autocast off: else it would narrow the products inside a backend as well."""

    def kernel(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return operator(*args)

    return kernel


def _register(operator: Operator) -> None:
    name, qualified = operator.name, f"rowmax::{operator.name}"
    _library.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.rowmax, name).default
    implementation = _IMPLEMENTATIONS[name] = _implementation(operator)
    apply = _AUTOGRAD[name] = autograd_of(operator, call)
    _library.impl(name, checked(operator, implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, operator.fake, lib=_library)
    standard = standard_form(name) or operator.unfused
    at_autograd = _at_autograd(overload, apply, operator.unfused, standard)
    _library.impl(name, at_autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(qualified, vmap_rule(operator, overload), lib=_library)
    register_when_loaded(operator)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _below_autocast(overload, device_type), key)


_library = torch.library.Library("rowmax", "DEF")
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_AUTOGRAD: dict[str, Callable[..., Any]] = {}

for _operator in OPERATORS.values():
    _register(_operator)
