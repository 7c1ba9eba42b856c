"""Row-wise functions broken in the ways that kernels of them break; see `mutation.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import Mask
from ...kernels.backends.reference import rows_keep
from ...kernels.testing.oracle import Kernel
from ...kernels.testing.rows import EPS, norm_equation, softmax_equation
from .implementations import Implementation

# name -> (op that it is a fault of, what is wrong)
FAULTS = {
    "one-pass-variance": ("layer_norm", "the variance is the mean of squares less a square"),
    "unbiased-variance": ("layer_norm", "the variance is divided by N - 1"),
    "no-eps": ("layer_norm", "eps is left out"),
    "eps-outside": ("rms_norm", "eps is added to the root, not under it"),
    "norm-statistics-in-half": ("layer_norm", "mean and variance are summed in half precision"),
    "rms-statistics-in-half": ("rms_norm", "the mean square is summed in half precision"),
    "last-row-skipped": ("layer_norm", "the gradient of the weight lacks the last row"),
    "mean-held": ("layer_norm", "the gradient takes the mean for a constant"),
    "rms-held": ("rms_norm", "the gradient takes the root mean square for a constant"),
    "norm-dropout-unscaled": ("add_layer_norm", "kept elements do not grow by 1 / (1 - p)"),
    "sum-before-dropout": ("add_layer_norm", "the sum that is returned has nothing dropped"),
    "softmax-off-by-one": ("masked_softmax", "one column more than the mask allows"),
    "softmax-no-maximum": ("masked_softmax", "exp of the scores as they are"),
}
# In half precision the rounding of the results is larger than what these do.
WIDE_ONLY = frozenset({"one-pass-variance"})


class RowMutant(Implementation):
    """The row-wise functions with one fault of FAULTS: an implementation like any other."""

    def __init__(self, fault: str) -> None:
        self.name = self.fault = fault
        self.ops = (FAULTS[fault][0],)

    def kernel(self, op: str) -> Kernel:
        return self._masked_softmax if op == "masked_softmax" else partial(self._norm, op)

    def _masked_softmax(
        self, scores: Tensor, mask: Mask | None = None, scale: float = 1.0
    ) -> Tensor:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        allowed = None if mask is None else mask.dense(*scores.shape)
        return self._softmax(wide, allowed, scale).to(scores.dtype)

    def _norm(
        self, op: str, x: Tensor, residual: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, ...]:
        stored = x.dtype
        tensors = {"x": x, "residual": residual, "weight": more.pop("weight", None)}
        tensors["bias"] = more.pop("bias", None)
        wide = {
            name: tensor.to(torch.promote_types(stored, torch.float32))
            for name, tensor in tensors.items()
            if tensor is not None
        }
        return tuple(y.to(stored) for y in self._wide_norm(op, wide, more, stored))

    def _softmax(self, scores: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
        if self.fault == "softmax-off-by-one" and allowed is not None:
            more = torch.cat((allowed[..., :1], allowed[..., :-1]), dim=-1)
            return softmax_equation(scores, allowed | more, scale)
        if self.fault == "softmax-no-maximum":
            scaled = scores * scale
            if allowed is not None:
                scaled = scaled.masked_fill(~allowed, -torch.inf)
            terms = scaled.exp()
            return terms / terms.sum(-1, keepdim=True).clamp_min(torch.finfo(terms.dtype).tiny)
        return softmax_equation(scores, allowed, scale)

    def _wide_norm(
        self, op: str, inputs: dict[str, Tensor], options: dict[str, Any], stored: torch.dtype
    ) -> tuple[Tensor, ...]:
        eps = options.get("eps", 1e-6 if op == "rms_norm" else EPS)
        dropout_p = options.get("dropout_p", 0.0)
        x, keep = inputs["x"], None
        if dropout_p > 0.0:
            keep = rows_keep(torch.tensor(options["seed"]), dropout_p, *x.shape)
        if op == "add_layer_norm":
            if self.fault == "norm-dropout-unscaled":
                dropped = inputs | {"x": x if keep is None else x * keep}
                return norm_equation(op, dropped, None, stored, eps=eps, dropout_p=0.0)
            y, _ = norm_equation(op, inputs, keep, stored, eps=eps, dropout_p=dropout_p)
            return y, inputs["residual"] + x
        normalised = self._normalised(x, eps)
        weight = inputs.get("weight")
        if weight is not None:
            if self.fault == "last-row-skipped" and len(x) > 1:
                held = (normalised[-1:] * weight.detach()) + 0 * weight.sum()
                normalised = torch.cat((normalised[:-1] * weight, held))
            else:
                normalised = normalised * weight
        bias = inputs.get("bias")
        return (normalised if bias is None else normalised + bias,)

    def _normalised(self, x: Tensor, eps: float) -> Tensor:
        fault = self.fault
        if self.ops == ("rms_norm",):
            mean_square = x.square().mean(-1, keepdim=True)
            if fault == "eps-outside":
                return x / (mean_square.sqrt() + eps)
            if fault == "rms-statistics-in-half":
                mean_square = _mean_in_half(x.square())
            root = (mean_square + eps).sqrt()
            return x / (root.detach() if fault == "rms-held" else root)
        in_half = fault == "norm-statistics-in-half"
        mean = _mean_in_half(x) if in_half else x.mean(-1, keepdim=True)
        if fault == "mean-held":
            mean = mean.detach()
        deviation = x - mean
        squares = deviation.square()
        variance = _mean_in_half(squares) if in_half else squares.mean(-1, keepdim=True)
        if fault == "one-pass-variance":
            variance = (x.square().mean(-1, keepdim=True) - mean.square()).clamp_min(0.0)
        if fault == "unbiased-variance":
            columns = x.shape[-1]
            variance = variance * (columns / max(1, columns - 1))
        root = (variance + (0.0 if fault == "no-eps" else eps)).sqrt()
        return deviation / root


def _mean_in_half(x: Tensor) -> Tensor:
    """The mean of each row, its running sum kept in bfloat16, which has float32's range."""
    total = x.new_zeros(*x.shape[:-1], 1)
    for part in x.split(4, dim=-1):
        grown = total + part.sum(-1, keepdim=True)
        # the gradient passes as if the sum were not rounded
        total = grown + (grown.detach().to(torch.bfloat16).to(x.dtype) - grown.detach())
    return total / max(1, x.shape[-1])
