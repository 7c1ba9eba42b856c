"""Layer norm through torch.ops.rowmax_native; the arithmetic is in csrc/layer_norm.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import LayerNormProblem


def layer_norm(problem: LayerNormProblem) -> tuple[Tensor, Tensor, Tensor]:
    x = problem.x
    y, mean, rstd = torch.ops.rowmax_native.layer_norm_forward(
        _rows(x), _contiguous(problem.weight), _contiguous(problem.bias), problem.eps
    )
    return y.view(x.shape), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def layer_norm_backward(
    problem: LayerNormProblem, grad_y: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = problem.x
    d_x, d_weight, d_bias = torch.ops.rowmax_native.layer_norm_backward(
        _rows(grad_y),
        _rows(x),
        mean.reshape(-1),
        rstd.reshape(-1),
        _contiguous(problem.weight),
        problem.weight is not None,
        problem.bias is not None,
    )
    return d_x.view(x.shape), d_weight, d_bias


def _rows(tensor: Tensor) -> Tensor:
    """(rows, N), copied only where the strides do not fit."""
    columns = tensor.shape[-1]
    rows = tensor.numel() // columns if columns else tensor.shape[:-1].numel()
    return tensor.reshape(rows, columns).contiguous()


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
