"""The norms of a backend that does all of them by one forward and one backward launch.

RMS norm is a layer norm without a mean; add-and-norm one of a sum that is computed on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..ops.problem import AddLayerNormProblem, AddNormInputs, LayerNormProblem, RMSNormProblem


class Forward(NamedTuple):
    """What the forward launch gets."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    subtract_mean: bool = True


class Backward(NamedTuple):
    """What the backward launch gets; RMS norm has no mean."""

    x: Tensor
    grad_y: Tensor
    grad_total: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dropout_p: float = 0.0
    seed: Tensor | None = None


Results = tuple[Tensor, Tensor, Tensor, Tensor]


class FusedNorms:
    """The six functions that `dispatch.Backend` asks for.

    forward: y, total, mean, rstd; without a residual total is y, and RMS norm's mean is rstd.
    backward: d_x (empty without dropout), d_total, d_weight, d_bias.
    """

    def __init__(
        self, forward: Callable[[Forward], Results], backward: Callable[[Backward], Results]
    ) -> None:
        self._forward = forward
        self._backward = backward

    def layer_norm(self, problem: LayerNormProblem) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, eps = problem
        y, _, mean, rstd = self._forward(Forward(x, None, weight, bias, eps))
        return y, mean, rstd

    def layer_norm_backward(
        self, problem: LayerNormProblem, grad_y: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, _ = problem
        return self._backward(Backward(x, grad_y, None, mean, rstd, weight, bias))[1:]

    def add_layer_norm(self, problem: AddLayerNormProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._forward(Forward(*problem))

    def add_layer_norm_backward(
        self, problem: AddLayerNormProblem, inputs: AddNormInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, _, weight, bias, _, dropout_p, seed = problem
        grad_y, grad_total, total, mean, rstd = inputs
        norm = Backward(total, grad_y, grad_total, mean, rstd, weight, bias, dropout_p, seed)
        return self._backward(norm)

    def rms_norm(self, problem: RMSNormProblem) -> tuple[Tensor, Tensor]:
        x, weight, eps = problem
        y, _, _, rstd = self._forward(Forward(x, None, weight, None, eps, subtract_mean=False))
        return y, rstd

    def rms_norm_backward(
        self, problem: RMSNormProblem, grad_y: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, weight, _ = problem
        return self._backward(Backward(x, grad_y, None, None, rstd, weight, None))[1:3]
