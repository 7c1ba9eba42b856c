"""The operators `masked_softmax` and `masked_softmax_backward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..api.masks import NO_MASK
from ..backends import reference
from ..backends.reference import second_order
from .operator_checks import Checks
from .problem import SoftmaxProblem
from .spec import Argument, Named, Operator, Result, TensorSpec, Values, arguments_of, gradient_of

_WEIGHTS = TensorSpec("B Hq Lq Lk", grad=True)


def _gradients(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    arguments = MASKED_SOFTMAX_BACKWARD.flat(given | {"grad_weights": gradients[0]})
    return (call("masked_softmax_backward", *arguments),)


def _second_order(
    call: Callable[..., Any], given: Named, wanted: dict[str, bool], gradients: Values
) -> Values:
    weights, scale, of_scores = given["weights"], given["scale"], gradients[0]
    return (
        second_order.masked_softmax_tangent(weights, scale, of_scores),
        second_order.masked_softmax_second_order(given["grad_weights"], weights, scale, of_scores),
    )


def _check(checks: Checks) -> None:
    checks.together("query_documents", "key_documents")
    checks.number("scale")


MASKED_SOFTMAX = Operator(
    name="masked_softmax",
    like="scores",
    arguments=arguments_of(SoftmaxProblem),
    results=(Result("weights", "scores", _WEIGHTS),),
    split=lambda fields: (SoftmaxProblem.from_flat(fields), ()),
    run=lambda backend, problem: backend.masked_softmax(problem),
    unfused_backend=reference,
    saves=("weights",),
    derivative=_gradients,
    independent=lambda _: ("B", "Hq"),
    check=_check,
)
MASKED_SOFTMAX_BACKWARD = Operator(
    name="masked_softmax_backward",
    like="weights",
    arguments=(
        Argument("grad_weights", "Tensor", _WEIGHTS),
        Argument("weights", "Tensor", _WEIGHTS),
        Argument("scale", "float"),
    ),
    results=(gradient_of("d_scores", Argument("weights", "Tensor", _WEIGHTS)),),
    # a gradient knows no mask: where it was masked, the weight is zero
    split=lambda fields: (SoftmaxProblem(fields[1], NO_MASK, fields[2]), fields),
    run=lambda backend, _, *rest: backend.masked_softmax_backward(*rest),
    unfused_backend=reference,
    saves=("grad_weights", "weights"),
    derivative=_second_order,
    independent=lambda _: ("B", "Hq", "Lq"),
    check=lambda checks: checks.number("scale"),
)
