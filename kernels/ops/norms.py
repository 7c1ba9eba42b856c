"""The operators of the norms: layer norm, add and layer norm, RMS norm, and their backward passes.

A backward pass reads the row that was normalised: x, or total = residual + dropout(x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import second_order
from ..backends.reference.norms import keep_factor
from .layout import statistics_dtype
from .operator_checks import Checks
from .problem import AddLayerNormProblem, AddNormInputs, LayerNormProblem, RMSNormProblem
from .spec import (
    Argument,
    Derivative,
    Named,
    Operator,
    Result,
    TensorSpec,
    Values,
    arguments_of,
    gradient_of,
)

_ROWS, _STATISTICS = TensorSpec("... N", grad=True), TensorSpec("...", "statistics")
_GRAD_Y = Argument("grad_y", "Tensor", _ROWS)
_MEAN, _RSTD = (Argument(name, "Tensor", _STATISTICS) for name in ("mean", "rstd"))
_TOTAL, _GRAD_TOTAL = Argument("total", "Tensor", _ROWS), Argument("grad_total", "Tensor?", _ROWS)


def _check(checks: Checks) -> None:
    checks.number("eps", least=0)
    checks.dropout()


def _independent(given: Named) -> tuple[str, ...]:
    return () if given.get("dropout_p", 0.0) > 0.0 else ("...",)


# --- derivatives ----------------------------------------------------------------------------------


def _gradients(backward: str) -> Derivative:
    """The first derivative of a norm of one input, by the operator of this name."""

    def derivative(
        call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
    ) -> Values:
        operator = NORMS[backward]
        if gradients[0] is None:
            return (None,) * len(operator.results)
        found = call(backward, *operator.flat(given | {"grad_y": gradients[0]}))
        return _of_present(given, operator, found)

    return derivative


def _add_gradients(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    operator = NORMS["add_layer_norm_backward"]
    grad_y, grad_total, *_ = gradients
    if grad_y is None and grad_total is None:
        return (None,) * len(operator.results)
    if grad_y is None:
        grad_y = torch.zeros_like(given["total"])
    of_results = {"grad_y": grad_y, "grad_total": grad_total}
    d_x, d_residual, *others = _of_present(
        given, operator, call("add_layer_norm_backward", *operator.flat(given | of_results))
    )
    # without dropout the gradient of x is that of the residual
    return d_residual if d_x is None else d_x, d_residual, *others


def _of_present(given: Named, operator: Operator, gradients: Values) -> Values:
    """None where a result is not present, for which there is an empty tensor."""
    return tuple(
        gradient if result.is_present(given) else None
        for result, gradient in zip(operator.results, gradients, strict=True)
    )


def _second_order(subtract_mean: bool) -> Derivative:
    def derivative(
        call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
    ) -> Values:
        operator = NORMS["layer_norm_backward" if subtract_mean else "rms_norm_backward"]
        t_x, t_weight, *t_bias = _of_present(given, operator, gradients)
        h_x, h_weight, t_y = _moved(given, "x", subtract_mean, t_x, t_weight, *t_bias)
        return t_y, h_x, h_weight

    return derivative


def _add_second_order(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    operator = NORMS["add_layer_norm_backward"]
    t_x, t_residual, t_weight, t_bias = _of_present(given, operator, gradients)
    # the tangent of residual + dropout(x), in the dtype of the statistics
    keep = keep_factor(_problem_of_total(given), statistics_dtype(given["total"].dtype))
    t_total = torch.zeros_like(given["total"], dtype=keep.dtype)
    for tangent in (None if t_x is None else keep * t_x, t_residual):
        t_total = t_total if tangent is None else t_total + tangent
    h_total, h_weight, t_y = _moved(given, "total", True, t_total, t_weight, t_bias)
    return t_y, t_total if wanted["grad_total"] else None, h_total, h_weight


def _moved(
    given: Named,
    row: str,
    subtract_mean: bool,
    t_row: Tensor | None,
    t_weight: Tensor | None,
    t_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """d<g, J t> by the row and the weight, and J t (reference/second_order.py)."""
    x, weight, eps = given[row], given["weight"], given["eps"]
    h_x, h_weight = second_order.norm_second_order(
        x, weight, eps, subtract_mean, given["grad_y"], t_row, t_weight
    )
    t_y = second_order.norm_tangents(x, weight, eps, subtract_mean, t_row, t_weight, t_bias)
    return h_x, None if weight is None else h_weight, t_y


# --- the operators --------------------------------------------------------------------------------


def _problem_of_total(given: Named) -> AddLayerNormProblem:
    """The total, of which a backward pass is a function, says shape and dtype of its terms."""
    total, fields = given["total"], AddLayerNormProblem._fields[2:]
    return AddLayerNormProblem(total, total, *(given[name] for name in fields))


def _rest_of(problem: type, inputs: int) -> tuple[Argument, ...]:
    """A problem's arguments behind its inputs, for a backward pass: the bias moves no gradient."""
    return tuple(
        argument._replace(spec=argument.spec._replace(grad=False))
        if argument.name == "bias" and argument.spec is not None
        else argument
        for argument in arguments_of(problem)[inputs:]
    )


def _norm(name: str, problem: Any, *, inputs: int, statistics: tuple[Argument, ...]) -> None:
    """Add the operator of a norm and that of its backward pass to `NORMS`."""
    arguments, rest = arguments_of(problem), _rest_of(problem, inputs)
    adds = inputs == 2
    row = _TOTAL if adds else arguments[0]
    parameters = tuple(each for each in rest if each.name in ("weight", "bias"))
    read = (row, *statistics) if adds else statistics
    before = (_GRAD_Y, *((_GRAD_TOTAL,) if adds else ()), *read)
    backward = f"{name}_backward"

    def run(backend: Any, problem: Any) -> Any:
        return getattr(backend, name)(problem)

    def run_backward(backend: Any, problem: Any, *rest: Any) -> Any:
        inputs = (AddNormInputs(*rest),) if adds else rest
        return getattr(backend, backward)(problem, *inputs)

    def split_backward(fields: Values) -> tuple[Any, Values]:
        read, own = fields[: len(before)], fields[len(before) :]
        return problem(*(read[2], read[2]) if adds else (), *own), read

    NORMS[name] = Operator(
        name=name,
        like="x",
        arguments=arguments,
        results=(
            Result("y", "x", _ROWS),
            *((Result("total", "x", _ROWS),) if adds else ()),
            *(Result(each.name, "x", _STATISTICS) for each in statistics),
        ),
        split=lambda fields: (problem(*fields), ()),
        run=run,
        unfused_backend=reference,
        saves=tuple(
            each.name
            for each in (*(read if adds else (row, *read)), *rest)
            if each.spec is not None
        ),
        derivative=_add_gradients if adds else _gradients(backward),
        independent=_independent,
        check=_check,
    )
    NORMS[backward] = Operator(
        name=backward,
        like=row.name,
        arguments=(*before, *(() if adds else (row,)), *rest),
        results=(
            *((gradient_of("d_x", row, when="dropout_p"),) if adds else ()),
            gradient_of("d_residual" if adds else "d_x", row),
            *(gradient_of(f"d_{each.name}", each, when=each.name) for each in parameters),
        ),
        split=split_backward,
        run=run_backward,
        unfused_backend=reference,
        saves=tuple(each.name for each in (_GRAD_Y, row, *rest) if each.spec is not None),
        derivative=_add_second_order if adds else _second_order(subtract_mean=len(statistics) > 1),
        independent=_independent,
        check=_check,
    )


NORMS: dict[str, Operator] = {}
_norm("layer_norm", LayerNormProblem, inputs=1, statistics=(_MEAN, _RSTD))
_norm("add_layer_norm", AddLayerNormProblem, inputs=2, statistics=(_MEAN, _RSTD))
_norm("rms_norm", RMSNormProblem, inputs=1, statistics=(_RSTD,))
