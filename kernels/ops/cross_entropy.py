"""The operator `linear_cross_entropy` and its backward pass.

The gradients are found with the loss, while the logits of a chunk are at hand: the backward pass
multiplies them by the gradient of the loss, a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import second_order
from .fast_path import are_ordinary, nothing_watches
from .operator_checks import Checks
from .problem import LinearCrossEntropyProblem
from .spec import Argument, Named, Operator, Result, TensorSpec, Values, arguments_of, gradient_of

_ARGUMENTS = arguments_of(LinearCrossEntropyProblem)
_X, _WEIGHT = _ARGUMENTS[:2]
_LOSS = TensorSpec("", "statistics", grad=True)
_D_X = Argument("d_x", "Tensor?", TensorSpec("T N"))
_D_WEIGHT = Argument("d_weight", "Tensor?", TensorSpec("V N"))


def _gradients(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    grad_loss = gradients[0]
    if grad_loss is None:
        return None, None
    if any(wanted[name] and not given[f"{name}_grad"] for name in wanted):
        asked = {f"{name}_grad": needed for name, needed in wanted.items()}
        found = call("linear_cross_entropy", *LINEAR_CROSS_ENTROPY.flat(given | asked))
        given = given | asked | dict(zip(("loss", "d_x", "d_weight"), found, strict=True))
    found = {name: given[f"d_{name}"] if given[f"{name}_grad"] else None for name in wanted}
    d_x, d_weight = found["x"], found["weight"]
    if not _is_one(grad_loss):
        operator = LINEAR_CROSS_ENTROPY_BACKWARD
        read = {"grad_loss": grad_loss, "d_x": d_x, "d_weight": d_weight}
        d_x, d_weight = call(operator.name, *operator.flat(given | read))
    return d_x if given["x_grad"] else None, d_weight if given["weight_grad"] else None


def _is_one(grad_loss: Tensor) -> bool:
    """Whether the gradients are right as they are: `loss.backward()` on a CPU, the usual call."""
    return (
        not torch.is_grad_enabled()
        and nothing_watches()
        and are_ordinary((grad_loss,))
        and grad_loss.is_cpu
        and grad_loss.item() == 1.0
    )


def _second_order(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    t_x = gradients[0] if given["x_grad"] else None
    t_weight = gradients[1] if given["weight_grad"] else None
    return second_order.linear_cross_entropy_second_order(
        _problem(given), given["grad_loss"], t_x, t_weight
    )


def _problem(given: Named) -> LinearCrossEntropyProblem:
    return LinearCrossEntropyProblem(*(given[argument.name] for argument in _ARGUMENTS))


def _scaled(
    _: Any,
    problem: LinearCrossEntropyProblem,
    grad_loss: Tensor,
    d_x: Tensor | None,
    d_weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if d_x is None else (d_x * grad_loss).to(d_x.dtype),
        None if d_weight is None else (d_weight * grad_loss).to(d_weight.dtype),
    )


def _check(checks: Checks) -> None:
    smoothing = checks.given["label_smoothing"]
    if not 0.0 <= smoothing <= 1.0:
        checks.fail("label_smoothing", smoothing, "a number from 0 to 1")


LINEAR_CROSS_ENTROPY = Operator(
    name="linear_cross_entropy",
    like="x",
    arguments=_ARGUMENTS,
    results=(
        Result("loss", "x", _LOSS),
        gradient_of("d_x", _X, when="x_grad"),
        gradient_of("d_weight", _WEIGHT, when="weight_grad"),
    ),
    split=lambda fields: (LinearCrossEntropyProblem(*fields), ()),
    run=lambda backend, problem: backend.linear_cross_entropy(problem),
    unfused_backend=reference,
    saves=("x", "weight", "target", "d_x", "d_weight"),
    derivative=_gradients,
    independent=lambda _: (),
    check=_check,
)
LINEAR_CROSS_ENTROPY_BACKWARD = Operator(
    name="linear_cross_entropy_backward",
    like="x",
    arguments=(Argument("grad_loss", "Tensor", _LOSS), _D_X, _D_WEIGHT, *_ARGUMENTS),
    results=(
        gradient_of("scaled_d_x", _X, when="x_grad"),
        gradient_of("scaled_d_weight", _WEIGHT, when="weight_grad"),
    ),
    split=lambda fields: (LinearCrossEntropyProblem(*fields[3:]), fields[:3]),
    run=_scaled,
    unfused_backend=reference,
    saves=("grad_loss", "x", "weight", "target"),
    derivative=_second_order,
    independent=lambda _: (),
    check=_check,
)
