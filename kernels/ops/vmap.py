"""`torch.func.vmap` over an operator: V samples at once where they are independent rows or heads.

The result is that of one call a sample. Where the operator's own batch (or rows) can hold the
samples, they go there and one call does it. Else there is a call a sample: with dropout, whose
decisions count batch elements and rows from the beginning of each sample; where a parameter or the
sinks differ from sample to sample, or want a gradient of each; and with packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .spec import Operator, TensorSpec, Values
from .torch_internals import OpOverload

_BATCH = ("B", "Bm")


def vmap_rule(operator: Operator, overload: OpOverload) -> Callable[..., Any]:
    """The rule of `operator` in the form of `torch.library.register_vmap`."""

    def rule(info: Any, in_dims: Values, *arguments: Any) -> tuple[Any, Any]:
        batched = tuple(dim is not None for dim in in_dims)
        arguments = tuple(
            argument if dim is None else argument.movedim(dim, 0)
            for argument, dim in zip(arguments, in_dims, strict=True)
        )
        found = _at_once(operator, overload, info.batch_size, arguments, batched)
        if found is None:
            found = _one_by_one(overload, info.batch_size, arguments, batched)
        outputs, out_dims = found
        return (outputs, out_dims) if len(operator.results) > 1 else (outputs[0], out_dims[0])

    return rule


def _one_by_one(
    overload: Callable[..., Any], size: int, arguments: Values, batched: tuple[bool, ...]
) -> tuple[Values, Values]:
    samples = [
        _outputs(
            overload(
                *(
                    argument[at] if has_samples else argument
                    for argument, has_samples in zip(arguments, batched, strict=True)
                )
            )
        )
        for at in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


def _outputs(outputs: Any) -> Values:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _at_once(
    operator: Operator,
    overload: Callable[..., Any],
    size: int,
    arguments: Values,
    batched: tuple[bool, ...],
) -> tuple[Values, Values] | None:
    """Outputs with V first where `out_dims` says 0; None where there must be a call a sample."""
    given = operator.named(arguments)
    has_samples = dict(zip((*operator.names, "backend"), batched, strict=True))
    independent = operator.independent(given)
    present = [result for result in operator.results if result.is_present(given)]
    if "..." in independent:
        batch = None
    elif "B" in independent:
        batch = given[operator.like].shape[1 if has_samples[operator.like] else 0]
    else:
        return None
    # the gradient of what broadcasts is one a sample, even where the samples share it
    own = {result.like for result in present if result.is_gradient}
    joined: list[Any] = []
    for argument in operator.arguments:
        value, has = given[argument.name], has_samples[argument.name]
        if not isinstance(value, Tensor) or argument.spec is None:
            joined.append(value)
        elif not _holds_samples(argument.spec):
            if has:
                return None
            joined.append(value)
        elif batch is None:
            joined.append(value if has else value.unsqueeze(0).expand(size, *value.shape))
        elif has or argument.spec.names[0] in _BATCH or argument.name in own or value.shape[0] > 1:
            joined.append(_joined(value, has, size, batch))
        else:  # broadcasts, and is shared
            joined.append(value)
    if not all(_holds_samples(result.spec) for result in present):
        return None  # a sum over all rows, of each sample
    outputs: list[Tensor] = []
    out_dims: list[int | None] = []
    for result, output in zip(
        operator.results, _outputs(overload(*joined, arguments[-1])), strict=True
    ):
        if result not in present:
            out_dims.append(None)
        else:
            out_dims.append(0)
            if batch is not None:
                output = output.unflatten(0, (size, batch))
                like = given[result.like]
                if result.is_gradient and like.shape[1 if has_samples[result.like] else 0] != batch:
                    output = output.sum(1, keepdim=True)  # it was broadcast
        outputs.append(output)
    return tuple(outputs), tuple(out_dims)


def _holds_samples(spec: TensorSpec) -> bool:
    """Whether the first dimension is the batch or one of rows."""
    return spec.names[:1] != () and spec.names[0].removesuffix("|1") in (*_BATCH, "...")


def _joined(tensor: Tensor, has_samples: bool, size: int, batch: int) -> Tensor:
    """(V * B, ...) of a tensor (V, B | 1, ...), or (B | 1, ...) that all samples share."""
    if not has_samples:
        tensor = tensor.unsqueeze(0)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)
