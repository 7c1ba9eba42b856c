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

from ..api.masks import MaskStructure
from .problem import AttentionProblem

Values = tuple[Any, ...]
# Arguments with V first where they are batched -> outputs with V first where `out_dims` says 0; or
# None where there must be a call a sample.
Fold = Callable[[Callable[..., Any], int, Values, tuple[bool, ...]], "tuple[Values, Values] | None"]


def vmap_rule(name: str, operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """The rule of `operator` in the form of `torch.library.register_vmap`."""
    fold = _FOLDS[name]
    one_output = len(operator._schema.returns) == 1

    def rule(info: Any, in_dims: Values, *arguments: Any) -> tuple[Any, Any]:
        batched = tuple(dim is not None for dim in in_dims)
        arguments = tuple(
            argument if dim is None else argument.movedim(dim, 0)
            for argument, dim in zip(arguments, in_dims, strict=True)
        )
        found = fold(operator, info.batch_size, arguments, batched)
        if found is None:
            found = _one_by_one(operator, info.batch_size, arguments, batched)
        outputs, out_dims = found
        return (outputs[0], out_dims[0]) if one_output else (outputs, out_dims)

    return rule


def _one_by_one(
    operator: Callable[..., Any], size: int, arguments: Values, batched: tuple[bool, ...]
) -> tuple[Values, Values]:
    samples = [
        _outputs(
            operator(
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


def _joined(tensor: Tensor, has_samples: bool, size: int, batch: int) -> Tensor:
    """(V * B, ...) of a tensor (V, B | 1, ...), or (B | 1, ...) that all samples share."""
    if not has_samples:
        tensor = tensor.unsqueeze(0)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def _joined_or_shared(
    tensor: Tensor | None, has_samples: bool, size: int, batch: int
) -> Tensor | None:
    """As `_joined`, but what has no batch of its own either stays as it is, and broadcasts."""
    if tensor is None or (not has_samples and tensor.shape[0] == 1):
        return tensor
    return _joined(tensor, has_samples, size, batch)


def _parted(tensor: Tensor, size: int, batch: int) -> Tensor:
    return tensor.unflatten(0, (size, batch))


# --- attention ------------------------------------------------------------------------------------

_MASK_FIELDS = len(MaskStructure._fields)
_SINKS = 6
_MASK_AT = 7


def _attention_fields(
    size: int, fields: Values, batched: tuple[bool, ...], bias_grad: bool
) -> Values | None:
    """The flat problem that holds all samples, or None where they can't be one problem."""
    problem = AttentionProblem.from_flat(fields[:-1])
    if problem.dropout_p > 0.0 or problem.query_starts is not None or batched[_SINKS]:
        return None
    batch = problem.query.shape[1 if batched[0] else 0]
    heads = (_joined(fields[at], batched[at], size, batch) for at in range(3))
    bias = problem.bias
    if bias is not None:
        # the gradient of a bias is one a sample, even where the samples share the bias
        bias = (_joined if bias_grad else _joined_or_shared)(bias, batched[3], size, batch)
    alibi = (_joined_or_shared(fields[at], batched[at], size, batch) for at in (4, 5))
    mask_end = _MASK_AT + _MASK_FIELDS
    mask = _mask_fields(fields[_MASK_AT:mask_end], batched[_MASK_AT:mask_end], size, batch)
    return (*heads, bias, *alibi, problem.sinks, *mask, *fields[mask_end:])


def _mask_fields(fields: Values, batched: Values, size: int, batch: int) -> Values:
    dense, *per_batch, lower, upper = fields
    return (
        _joined_or_shared(dense, batched[0], size, batch),
        *(
            None if tensor is None else _joined(tensor, has_samples, size, batch)
            for tensor, has_samples in zip(per_batch, batched[1:-2], strict=True)
        ),
        *(lower, upper),
    )


def _attention(
    operator: Callable[..., Any], size: int, arguments: Values, batched: tuple[bool, ...]
) -> tuple[Values, Values] | None:
    fields = _attention_fields(size, arguments, batched, bias_grad=False)
    if fields is None:
        return None
    batch = arguments[0].shape[1 if batched[0] else 0]
    return tuple(_parted(output, size, batch) for output in operator(*fields)), (0, 0)


def _attention_backward(
    operator: Callable[..., Any], size: int, arguments: Values, batched: tuple[bool, ...]
) -> tuple[Values, Values] | None:
    bias_grad, sinks_grad = arguments[4:6]
    fields = None
    if not sinks_grad:
        fields = _attention_fields(size, arguments[6:], batched[6:], bias_grad)
    if fields is None:
        return None
    batch = arguments[6].shape[1 if batched[6] else 0]
    of_outputs = (
        None if tensor is None else _joined(tensor, has_samples, size, batch)
        for tensor, has_samples in zip(arguments[:4], batched[:4], strict=True)
    )
    *gradients, d_bias, d_sinks = operator(*of_outputs, bias_grad, sinks_grad, *fields)
    parted = [_parted(gradient, size, batch) for gradient in gradients]
    if not bias_grad:
        return (*parted, d_bias, d_sinks), (0, 0, 0, None, None)
    d_bias = _parted(d_bias, size, batch)
    if arguments[9].shape[1 if batched[9] else 0] == 1:
        d_bias = d_bias.sum(1, keepdim=True)
    return (*parted, d_bias, d_sinks), (0, 0, 0, 0, None)


def _masked_softmax(
    operator: Callable[..., Any], size: int, arguments: Values, batched: tuple[bool, ...]
) -> tuple[Values, Values] | None:
    scores, *mask, scale, backend = arguments
    batch = scores.shape[1 if batched[0] else 0]
    fields = _mask_fields(tuple(mask), batched[1 : 1 + _MASK_FIELDS], size, batch)
    weights = operator(_joined(scores, batched[0], size, batch), *fields, scale, backend)
    return (_parted(weights, size, batch),), (0,)


def _masked_softmax_backward(
    operator: Callable[..., Any], size: int, arguments: Values, batched: tuple[bool, ...]
) -> tuple[Values, Values] | None:
    batch = arguments[1].shape[1 if batched[1] else 0]
    both = (_joined(arguments[at], batched[at], size, batch) for at in (0, 1))
    return (_parted(operator(*both, *arguments[2:]), size, batch),), (0,)


# --- norms: samples are rows ----------------------------------------------------------------------


def _rows_together(
    rows: int, parameters: int, out_dims: tuple[int | None, ...], drops: bool = False
) -> Fold:
    """The rule of a norm: `rows` arguments hold rows, the next `parameters` (N,) or None.

    With one set of parameters for all samples, their rows are rows of one call. A backward pass
    sums over rows, so only without parameters; the gradients of what is absent are empty, with
    None in `out_dims`. With `drops` there is dropout_p, third from the end.
    """
    end = rows + parameters
    sums = None in out_dims

    def fold(
        operator: Callable[..., Any], size: int, arguments: Values, batched: tuple[bool, ...]
    ) -> tuple[Values, Values] | None:
        given = any(parameter is not None for parameter in arguments[rows:end])
        if (drops and arguments[-3] > 0.0) or any(batched[rows:end]) or (sums and given):
            return None
        of_rows = (
            tensor
            if tensor is None or has_samples
            else tensor.unsqueeze(0).expand(size, *tensor.shape)
            for tensor, has_samples in zip(arguments[:rows], batched[:rows], strict=True)
        )
        return _outputs(operator(*of_rows, *arguments[rows:])), out_dims

    return fold


_FOLDS: dict[str, Fold] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "masked_softmax": _masked_softmax,
    "masked_softmax_backward": _masked_softmax_backward,
    "layer_norm": _rows_together(1, 2, (0, 0, 0)),
    "layer_norm_backward": _rows_together(4, 2, (0, None, None)),
    "add_layer_norm": _rows_together(2, 2, (0, 0, 0, 0), drops=True),
    "add_layer_norm_backward": _rows_together(5, 2, (None, 0, None, None), drops=True),
    "rms_norm": _rows_together(1, 1, (0, 0)),
    "rms_norm_backward": _rows_together(3, 1, (0, None)),
}
