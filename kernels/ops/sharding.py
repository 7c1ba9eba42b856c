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

from .spec import Named, Operator, TensorSpec, Values
from .torch_internals import remember_decisions_by

# the dimension that is sharded of each argument, by position, and of each output; None: whole, and
# _SUM an output of which each machine has a part of the sum
Way = tuple[dict[int, int | None], Sequence[int | None]]
_SUM = -1

# dimensions that are sharded together
_TOGETHER = {"B": ("B", "Bm"), "Hq": ("Hq", "Hkv"), "Lq": ("Lq",)}
_operators: list[Operator] = []


def register_when_loaded(operator: Operator) -> None:
    _operators.append(operator)


def register_if_loaded() -> None:
    """Makes the rules known where there can be a DTensor."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for operator in _operators:
        overload = getattr(torch.ops.rowmax, operator.name).default
        register_sharding(overload)(_rule(operator))
        # By all arguments: torch's own choice, the tensors and what follows the first int, would
        # mix up calls that want a bias's gradient or not.
        remember_decisions_by(overload, 0)


def _rule(operator: Operator) -> Callable[..., Any]:
    """The function of all arguments, tensors among them as specifications, that torch asks."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def placed(at: int | None) -> Any:
        return Replicate() if at is None else Partial() if at == _SUM else Shard(at)

    def rule(*arguments: Any) -> Any:
        whole: Way = ({}, (None,) * len(operator.results))
        return [
            (
                [placed(at) for at in of_outputs],
                [
                    placed(of_inputs.get(position)) if hasattr(argument, "placements") else None
                    for position, argument in enumerate(arguments)
                ],
            )
            for of_inputs, of_outputs in (whole, *_ways(operator, arguments))
        ]

    return rule


def _ways(operator: Operator, arguments: Values) -> Iterator[Way]:
    given = operator.named(arguments)
    for dim in operator.independent(given):
        if dim == "...":
            for at in range(len(given[operator.like].shape) - 1):
                yield _way(operator, given, functools.partial(_of_rows, at))
        else:
            names = _TOGETHER[dim]
            if _divides(operator, given, names):
                yield _way(operator, given, functools.partial(_of_dim, names))


def _of_rows(at: int, spec: TensorSpec) -> int | None:
    return at if spec.names[:1] == ("...",) else None


def _of_dim(names: tuple[str, ...], spec: TensorSpec) -> int | None:
    return spec.find(names)


def _way(operator: Operator, given: Named, find: Callable[[TensorSpec], int | None]) -> Way:
    inputs: dict[int, int | None] = {}
    at_of: dict[str, int | None] = {}
    for position, argument in enumerate(operator.arguments):
        value = given[argument.name]
        at = find(argument.spec) if argument.spec is not None and value is not None else None
        if at is not None and argument.spec is not None and "|1" in argument.spec.dims:
            at = None if value.shape[at] == 1 else at
        inputs[position] = at_of[argument.name] = at
    outputs: list[int | None] = []
    for result in operator.results:
        if not result.is_present(given):
            outputs.append(None)
        elif result.is_gradient:
            at = at_of[result.like]
            outputs.append(_SUM if at is None else at)
        else:
            outputs.append(find(result.spec))
    return inputs, outputs


def _divides(operator: Operator, given: Named, names: tuple[str, ...]) -> bool:
    """Whether equal parts stay together: groups of grouped heads are not to be torn."""
    sizes = set()
    for argument in operator.arguments:
        spec, value = argument.spec, given[argument.name]
        if spec is None or value is None or "|1" in spec.dims:
            continue
        at = spec.find(names)
        if at is not None:
            sizes.add(value.shape[at])
    machines = given[operator.like].mesh.size()
    return len(sizes) < 2 or all(size % machines == 0 for size in sizes)
