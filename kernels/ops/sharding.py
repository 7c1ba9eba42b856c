"""How the operators take DTensors: attention by batch elements or heads, norms by rows.

Registered when the first operator runs in a process that has loaded `torch.distributed.tensor`,
which is slow to import. What no rule covers is gathered first: dropout among it, which counts batch
elements, heads and rows from the beginning of the whole.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .problem import AttentionProblem

Values = tuple[Any, ...]
# the dimension that is sharded of each argument, by position, and of each output; None: whole, and
# _SUM an output of which each machine has a part of the sum
Way = tuple[dict[int, int | None], Sequence[int | None]]
_SUM = -1

_TENSORS_OF_MASK = 6  # dense_mask and five of one row for each batch element


def register_if_loaded() -> None:
    """Makes the rules known where there can be a DTensor."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, ways in _WAYS.items():
        operator = getattr(torch.ops.rowmax, name).default
        register_sharding(operator)(_rule(operator, ways))
        # Decisions are remembered by the tensors, and by the other arguments from this one on.
        # torch's own choice, the first int, would mix up calls that want a bias's gradient or not.
        propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(0, needs_pytree=True)


def _rule(
    operator: torch._ops.OpOverload, ways: Callable[[Values], Iterator[Way]]
) -> Callable[..., Any]:
    """The function of all arguments, tensors among them as specifications, that torch asks."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    outputs = len(operator._schema.returns)

    def placed(at: int | None) -> Any:
        return Replicate() if at is None else Partial() if at == _SUM else Shard(at)

    def rule(*arguments: Any) -> Any:
        whole: Way = ({}, (None,) * outputs)
        return [
            (
                [placed(at) for at in of_outputs],
                [
                    placed(of_inputs.get(position)) if hasattr(argument, "placements") else None
                    for position, argument in enumerate(arguments)
                ],
            )
            for of_inputs, of_outputs in (whole, *ways(arguments))
        ]

    return rule


# --- attention and masked softmax -----------------------------------------------------------------


def _attention(arguments: Values) -> Iterator[Way]:
    for inputs in _of_problem(AttentionProblem.from_flat(arguments[:-1]), arguments):
        yield inputs, (inputs[0], inputs[0])


def _attention_backward(arguments: Values) -> Iterator[Way]:
    bias_grad, sinks_grad, *fields = arguments[4:]
    for inputs in _of_problem(AttentionProblem.from_flat(tuple(fields[:-1])), tuple(fields)):
        at = inputs[0]
        shifted = {6 + position: dim for position, dim in inputs.items()}
        of_bias = _of_gradient(bias_grad, inputs.get(3))
        of_sinks = _of_gradient(sinks_grad, inputs.get(6))
        yield {**dict.fromkeys(range(4), at), **shifted}, (at, at, at, of_bias, of_sinks)


def _of_gradient(wanted: bool, sharded: int | None) -> int | None:
    """Of an input's gradient: as the input, a sum where that is whole; empty where not wanted."""
    if not wanted:
        return None
    return _SUM if sharded is None else sharded


def _of_problem(problem: AttentionProblem, fields: Values) -> Iterator[dict[int, int | None]]:
    """Batch elements, then heads, where these are independent."""
    if problem.dropout_p > 0.0:
        return
    batched = (4, 5, *range(8, 7 + _TENSORS_OF_MASK))
    if problem.query_starts is None:
        yield {
            **dict.fromkeys(range(3), 0),
            **{at: _unless_broadcast(fields[at], 0) for at in (3, 7, *batched)},
        }
    heads, key_heads = problem.query.shape[1], problem.key.shape[1]
    # groups of grouped heads have to stay together
    if heads == key_heads or key_heads % _machines(problem.query) == 0:
        yield {
            **dict.fromkeys(range(3), 1),
            **{at: _unless_broadcast(fields[at], 1) for at in (3, 4, 7)},
            6: 0,
        }


def _machines(spec: Any) -> int:
    machines: int = spec.mesh.size()
    return machines


def _unless_broadcast(spec: Any, at: int) -> int | None:
    return None if spec is None or spec.shape[at] == 1 else at


def _masked_softmax(arguments: Values) -> Iterator[Way]:
    for at in (0, 1):
        inputs: dict[int, int | None] = {0: at, 1: _unless_broadcast(arguments[1], at)}
        if at == 0:
            inputs |= dict.fromkeys(range(2, 1 + _TENSORS_OF_MASK), 0)
        yield inputs, (at,)


def _masked_softmax_backward(arguments: Values) -> Iterator[Way]:
    for at in range(3):
        yield {0: at, 1: at}, (at,)


# --- norms: every dimension but the last holds rows -----------------------------------------------


def _rows(
    rows: Sequence[int], parameters: Sequence[int], outputs: Sequence[int | None], drops: int | None
) -> Callable[[Values], Iterator[Way]]:
    """The ways of a norm: the arguments at `rows` hold rows, those at `parameters` (N,) or None.

    The last of `rows` is (..., N), others may be statistics (...).

    Of the outputs, 0 is one of rows, None one that is empty without dropout, and a negative number
    -n the gradient of parameter n - 1. `drops` is where dropout_p stands.
    """

    def ways(arguments: Values) -> Iterator[Way]:
        if drops is not None and arguments[drops] > 0.0:
            return
        for at in range(len(arguments[rows[-1]].shape) - 1):
            of_outputs: list[int | None] = []
            for output in outputs:
                if output is None or output >= 0:
                    of_outputs.append(None if output is None else at)
                else:
                    given = arguments[parameters[-output - 1]] is not None
                    of_outputs.append(_SUM if given else None)
            yield dict.fromkeys(rows, at), of_outputs

    return ways


_WAYS: dict[str, Callable[[Values], Iterator[Way]]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "masked_softmax": _masked_softmax,
    "masked_softmax_backward": _masked_softmax_backward,
    "layer_norm": _rows((0,), (1, 2), (0, 0, 0), None),
    "layer_norm_backward": _rows((0, 1, 2, 3), (4, 5), (0, -1, -2), None),
    "add_layer_norm": _rows((0, 1), (2, 3), (0, 0, 0, 0), 5),
    "add_layer_norm_backward": _rows((0, 1, 3, 4, 2), (5, 6), (None, 0, -1, -2), 8),
    "rms_norm": _rows((0,), (1,), (0, 0), None),
    "rms_norm_backward": _rows((0, 1, 2), (3,), (0, -1), None),
}
