"""The norms of a backend that does all of them by one forward and one backward launch.

RMS norm is a layer norm without a mean; add-and-norm one of a sum that is computed on the way.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..ops.problem import AddLayerNormProblem, LayerNormProblem, RMSNormProblem


class Forward(Protocol):
    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dropout_p: float,
        seed: Tensor | None,
        *,
        subtract_mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, total, mean, rstd; without a residual total is y, and RMS norm's mean is rstd."""


class Backward(Protocol):
    def __call__(
        self,
        x: Tensor,
        grad_y: Tensor,
        grad_total: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d_x (empty without dropout), d_total, d_weight, d_bias; RMS norm has no mean."""


class FusedNorms:
    """The six functions that `dispatch.Backend` asks for."""

    def __init__(self, forward: Forward, backward: Backward) -> None:
        self._forward = forward
        self._backward = backward

    def layer_norm(self, problem: LayerNormProblem) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, eps = problem
        y, _, mean, rstd = self._forward(x, None, weight, bias, eps, 0.0, None, subtract_mean=True)
        return y, mean, rstd

    def layer_norm_backward(
        self, problem: LayerNormProblem, grad_y: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias, _ = problem
        _, d_x, d_weight, d_bias = self._backward(
            x, grad_y, None, mean, rstd, weight, bias, 0.0, None
        )
        return d_x, d_weight, d_bias

    def add_layer_norm(self, problem: AddLayerNormProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, residual, weight, bias, eps, dropout_p, seed = problem
        return self._forward(x, residual, weight, bias, eps, dropout_p, seed, subtract_mean=True)

    def add_layer_norm_backward(
        self,
        problem: AddLayerNormProblem,
        grad_y: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, _, weight, bias, _, dropout_p, seed = problem
        return self._backward(total, grad_y, grad_total, mean, rstd, weight, bias, dropout_p, seed)

    def rms_norm(self, problem: RMSNormProblem) -> tuple[Tensor, Tensor]:
        x, weight, eps = problem
        y, _, _, rstd = self._forward(x, None, weight, None, eps, 0.0, None, subtract_mean=False)
        return y, rstd

    def rms_norm_backward(
        self, problem: RMSNormProblem, grad_y: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, weight, _ = problem
        _, d_x, d_weight, _ = self._backward(x, grad_y, None, None, rstd, weight, None, 0.0, None)
        return d_x, d_weight
