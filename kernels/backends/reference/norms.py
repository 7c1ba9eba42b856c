"""Layer norm, add-and-norm and RMS norm as the equations say them; rows are the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import statistics_dtype
from ...ops.problem import AddLayerNormProblem, AddNormInputs, LayerNormProblem, RMSNormProblem
from .philox import keep_scale, rows_keep


def layer_norm(problem: LayerNormProblem) -> tuple[Tensor, Tensor, Tensor]:
    return _normalise(problem.x, problem.weight, problem.bias, problem.eps)


def layer_norm_backward(
    problem: LayerNormProblem, grad_y: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_bias = _normalise_backward(
        grad_y, problem.x, problem.weight, problem.bias, mean, rstd
    )
    return d_x.to(problem.x.dtype), d_weight, d_bias


def add_layer_norm(problem: AddLayerNormProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(problem.x.dtype)
    total = problem.residual.to(dtype) + problem.x.to(dtype) * keep_factor(problem, dtype)
    total = total.to(problem.x.dtype).contiguous()
    y, mean, rstd = _normalise(total, problem.weight, problem.bias, problem.eps)
    return y, total, mean, rstd


def add_layer_norm_backward(
    problem: AddLayerNormProblem, inputs: AddNormInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = problem.x
    grad_y, grad_total, total, mean, rstd = inputs
    d_total, d_weight, d_bias = _normalise_backward(
        grad_y, total, problem.weight, problem.bias, mean, rstd
    )
    if grad_total is not None:
        d_total = d_total + grad_total
    d_x = (d_total * keep_factor(problem, d_total.dtype)).to(x.dtype)
    return d_x if problem.dropout_p > 0.0 else x.new_empty(0), d_total.to(x.dtype), d_weight, d_bias


def rms_norm(problem: RMSNormProblem) -> tuple[Tensor, Tensor]:
    x = problem.x.to(statistics_dtype(problem.x.dtype))
    rstd = torch.rsqrt((x * x).mean(-1) + problem.eps)
    y = x * rstd.unsqueeze(-1)
    if problem.weight is not None:
        y = y * problem.weight
    return y.to(problem.x.dtype).contiguous(), rstd


def rms_norm_backward(
    problem: RMSNormProblem, grad_y: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(problem.x.dtype)
    x_hat = problem.x.to(dtype) * rstd.unsqueeze(-1)
    d_y = grad_y.to(dtype)
    d_x_hat = d_y if problem.weight is None else d_y * problem.weight
    d_x = rstd.unsqueeze(-1) * (d_x_hat - x_hat * (d_x_hat * x_hat).mean(-1, keepdim=True))
    return d_x.to(problem.x.dtype).contiguous(), _over_rows(d_y * x_hat, problem.weight)


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(statistics_dtype(x.dtype))
    mean = wide.mean(-1)
    deviation = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt((deviation * deviation).mean(-1) + eps)
    y = deviation * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous(), mean, rstd


def _normalise_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x (in the dtype of the statistics), d_weight, d_bias."""
    dtype = statistics_dtype(x.dtype)
    x_hat = (x.to(dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    d_y = grad_y.to(dtype)
    d_x_hat = d_y if weight is None else d_y * weight
    d_x = rstd.unsqueeze(-1) * (
        d_x_hat - d_x_hat.mean(-1, keepdim=True) - x_hat * (d_x_hat * x_hat).mean(-1, keepdim=True)
    )
    return d_x.contiguous(), _over_rows(d_y * x_hat, weight), _over_rows(d_y, bias)


def _over_rows(terms: Tensor, parameter: Tensor | None) -> Tensor:
    """The sum over all rows, as a gradient of `parameter`; empty when that is absent."""
    if parameter is None:
        return terms.new_empty(0)
    rows = terms.shape[:-1].numel()
    return terms.reshape(rows, terms.shape[-1]).sum(0).to(parameter.dtype)


def keep_factor(problem: AddLayerNormProblem, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies x by, of x's shape, or a scalar 1."""
    x = problem.x
    if problem.dropout_p == 0.0 or problem.seed is None:
        return torch.ones((), dtype=dtype, device=x.device)
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    keep = rows_keep(problem.seed.to(x.device), problem.dropout_p, rows, columns)
    return (keep.to(dtype) * keep_scale(problem.dropout_p)).view(x.shape)
