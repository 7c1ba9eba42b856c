"""The operator `linear_cross_entropy` and its backward pass.

The gradients are found with the loss, while the logits of a chunk are at hand. They are those of
the sum over the tokens; the backward pass multiplies them by the gradient of the loss and by
1 / tokens at once. It does so in place the first time; a graph that is kept for more computes them
anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import second_order
from ..backends.reference.cross_entropy import token_scale
from .fast_path import are_ordinary, nothing_watches
from .layout import statistics_dtype
from .operator_checks import Checks
from .problem import LinearCrossEntropyProblem
from .spec import Argument, Named, Operator, Result, TensorSpec, Values, arguments_of, gradient_of

_ARGUMENTS = arguments_of(LinearCrossEntropyProblem)
_X, _WEIGHT = _ARGUMENTS[:2]
_LOSS = TensorSpec("", "statistics", grad=True)
_D_X = Argument("d_x", "Tensor?", TensorSpec("T N"))
_SUMS = TensorSpec("V N", "statistics")
_D_WEIGHT = Argument("d_weight", "Tensor?", _SUMS)


def _gradients(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    grad_loss = gradients[0]
    if grad_loss is None:
        return None, None
    if any(wanted[name] and not _is_there(given, name) for name in wanted):
        asked = {f"{name}_grad": needed for name, needed in wanted.items()}
        with torch.no_grad():
            found = call("linear_cross_entropy", *LINEAR_CROSS_ENTROPY.flat(given | asked))
        named = dict(zip(("loss", "d_x", "d_weight"), found, strict=True))
        given = given | asked | named | {"given_away": True}
    problem = _problem(given)
    read = {f"d_{name}": given[f"d_{name}"] if wanted[name] else None for name in wanted}
    there = [tensor for tensor in read.values() if tensor is not None]
    if given["given_away"] and _may_change(grad_loss, *there):
        scaled = _scaled(None, problem, grad_loss, read["d_x"], read["d_weight"], in_place=True)
    else:
        operator = LINEAR_CROSS_ENTROPY_BACKWARD
        flags = {f"{name}_grad": read[f"d_{name}"] is not None for name in wanted}
        scaled = call(
            operator.name, *operator.flat(given | flags | read | {"grad_loss": grad_loss})
        )
    d_x, d_weight = scaled
    return d_x if wanted["x"] else None, d_weight if wanted["weight"] else None


def _is_there(given: Named, name: str) -> bool:
    return given[f"{name}_grad"] and given[f"d_{name}"] is not None


def _may_change(*tensors: Tensor) -> bool:
    return not torch.is_grad_enabled() and nothing_watches() and are_ordinary(tensors)


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
    *,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Times the gradient of the loss and 1 / tokens; rounded to a half type once."""
    dtype = statistics_dtype(problem.x.dtype)
    factor = grad_loss.to(dtype) * token_scale(problem, dtype)
    scaled: list[Tensor | None] = []
    for gradient in (d_x, d_weight):
        if gradient is None:
            scaled.append(None)
        elif in_place and gradient.dtype == problem.x.dtype == dtype:
            scaled.append(gradient.mul_(factor))
        else:
            scaled.append((gradient.to(dtype) * factor).to(problem.x.dtype))
    return scaled[0], scaled[1]


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
        Result("d_weight", "weight", _SUMS, when="weight_grad"),
    ),
    split=lambda fields: (LinearCrossEntropyProblem(*fields), ()),
    run=lambda backend, problem: backend.linear_cross_entropy(problem),
    unfused_backend=reference,
    saves=("x", "weight", "target"),
    given_away=("d_x", "d_weight"),
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
