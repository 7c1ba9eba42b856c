"""The loss of a language model's last layer: arguments checked, one op called."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..ops import operators
from ..ops.problem import LinearCrossEntropyProblem
from ..ops.torch_internals import any_autocast_enabled
from .checks import (
    autocast,
    fail_type,
    fail_value,
    require_device,
    require_float,
    require_like,
    require_number,
    require_tensor,
    shape_text,
)

_NAME = "linear_cross_entropy"
_REDUCTIONS = ("mean", "sum")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """`F.cross_entropy(F.linear(x, weight), target)` without a tensor of all logits.

    Logits are made for a chunk of tokens at a time and become their gradient in place, so that
    memory is that of both gradients and one chunk. The gradients are found with the loss.

    Args:
        x: (..., N) float. weight: (V, N), dtype and device of x; cast as x under autocast.
        target: (...) int64, the index of each token's word, 0 to V - 1.
        label_smoothing: s of q = (1 - s) * [j = target] + s / V (Szegedy et al. 2016, section 7).
        ignore_index: tokens with this target have no loss and no gradient.
        reduction: "mean" over the tokens that are not ignored (NaN of none), or "sum".

    Returns:
        () in float32, or float64 for float64 inputs.

    Raises:
        IndexError: a target that is no word, by the fused backends of the CPU; by others, whose
            check would wait for a GPU, the loss is NaN.
    """
    require_float(_NAME, "x", x)
    require_float(_NAME, "weight", weight)
    if any_autocast_enabled():
        x, weight = autocast(x, weight)
    require_like(_NAME, "weight", weight, "x", x)
    require_device(_NAME, "weight", weight, "x", x)
    if x.dim() == 0:
        fail_value(_NAME, "x", "a 0-d tensor", "shape (..., N)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        expected = f"shape (V, {x.shape[-1]}), a row for each word"
        fail_value(_NAME, "weight", f"shape {shape_text(weight.shape)}", expected)
    require_tensor(_NAME, "target", target)
    if target.dtype != torch.int64:
        fail_type(_NAME, "target", target.dtype, "dtype torch.int64, the words' indices")
    require_device(_NAME, "target", target, "x", x)
    if target.shape != x.shape[:-1]:
        got, expected = f"shape {shape_text(target.shape)}", shape_text(x.shape[:-1])
        fail_value(_NAME, "target", got, f"shape {expected}, one word for each row of x")
    smoothing = require_number(_NAME, "label_smoothing", label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        fail_value(_NAME, "label_smoothing", label_smoothing, "a number from 0 to 1")
    if type(ignore_index) is not int:
        fail_type(_NAME, "ignore_index", type(ignore_index).__name__, "an int")
    if not -(2**63) <= ignore_index < 2**63:
        fail_value(_NAME, "ignore_index", ignore_index, "an int of 64 bits, as a target is")
    if reduction not in _REDUCTIONS:
        fail_value(_NAME, "reduction", repr(reduction), f"one of {', '.join(_REDUCTIONS)}")
    needs_grad = torch.is_grad_enabled()
    x_grad, weight_grad = needs_grad and x.requires_grad, needs_grad and weight.requires_grad
    rows, words = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    problem = LinearCrossEntropyProblem(
        rows, weight, words, smoothing, ignore_index, reduction == "mean", x_grad, weight_grad
    )
    return operators.linear_cross_entropy(problem, dispatch.check_name(_NAME, backend))
