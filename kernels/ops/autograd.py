"""What autograd does with each operator, by the derivatives that its spec names.

A first gradient is the backend's: one backward operator for each forward one. The derivatives of
that are the formulas of `reference/second_order.py`; and while forward mode is on, the reference
runs in the operator's place, for torch's own operations carry tangents. Both write an attention's
scores out, whatever the backend, and can be differentiated further.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .spec import Operator, Values
from .torch_internals import (
    SingleLevelFunction,
    functorch_is_active,
    set_forward_mode,
    single_level_functions,
)

Call = Callable[..., Any]


def autograd_of(operator: Operator, call: Call) -> Call:
    """(run, arguments) -> outputs, with the derivatives of `operator`.

    `run(*arguments)` computes the outputs: below autograd in torch's dispatcher, or at once. The
    base class is the one that functorch builds on too: it serves one level of `torch.func.grad`, as
    the derivative of a torch operator does, where the public one wants to serve them all.
    """
    names = (*operator.names, "backend")
    differentiable_at = [names.index(name) for name in operator.differentiable]
    tensors = {argument.name for argument in operator.arguments if argument.spec is not None}
    constant_at = [at for at, name in enumerate(names) if name not in tensors]
    argument_at = [at for at, name in enumerate(names) if name in operator.saves]
    results = [result.name for result in operator.results]
    away_at = [at for at, name in enumerate(results) if name in operator.given_away]
    result_at = [at for at, name in enumerate(results) if name in operator.saves]
    assert len(argument_at) + len(result_at) == len(operator.saves)
    saved = (*(names[at] for at in argument_at), *(results[at] for at in result_at))
    kept = (*saved, *(names[at] for at in constant_at))
    absent = dict.fromkeys((*names, *results))
    one_output = len(results) == 1
    nothing = (None, None)

    def forward(ctx: Any, run: Call, arguments: Values, *differentiable: Tensor | None) -> Any:
        if functorch_is_active():
            # autograd has switched itself off for this level: the others go on
            with torch.enable_grad(), set_forward_mode(True):
                outputs = run(*arguments)
        else:
            outputs = run(*arguments)
        ctx.set_materialize_grads(False)
        ctx.constants = [arguments[at] for at in constant_at]
        found = (outputs,) if one_output else outputs
        to_save = [*[arguments[at] for at in argument_at], *[found[at] for at in result_at]]
        away = [found[at] for at in away_at]
        if not away:
            ctx.save_for_backward(*to_save)
            return outputs
        if functorch_is_active():
            ctx.given_away = None
            ctx.save_for_backward(*to_save, *away)
            return outputs
        # The caller gets empty ones: nobody but the first backward pass has these.
        ctx.given_away = away
        ctx.save_for_backward(*to_save)
        empty = [result.new_empty(0) for result in away]
        ctx.mark_non_differentiable(*empty)
        rest = iter(empty)
        return tuple(next(rest) if at in away_at else each for at, each in enumerate(found))

    def backward(ctx: Any, *gradients: Tensor | None) -> Values:
        needed = ctx.needs_input_grad[2:]
        if all(gradient is None for gradient in gradients):
            return nothing + (None,) * len(needed)
        tensors = ctx.saved_tensors
        kept_here = (*tensors[: len(saved)], *ctx.constants)
        given = absent | dict(zip(kept, kept_here, strict=True))
        if away_at:
            away, ctx.given_away = ctx.given_away, None
            given["given_away"] = away is not None
            away = away or tensors[len(saved) :]
            given |= dict(zip(operator.given_away, away, strict=False))
        wanted = dict(zip(operator.differentiable, needed, strict=True))
        return nothing + tuple(operator.derivative(call, given, wanted, gradients))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"rowmax_{operator.name}", (SingleLevelFunction,), methods)

    def apply(run: Call, arguments: Values) -> Any:
        differentiable = [arguments[at] for at in differentiable_at]
        if functorch_is_active():
            with single_level_functions():
                return function.apply(run, arguments, *differentiable)
        return function.apply(run, arguments, *differentiable)

    return apply
