"""Norms through torch.ops.rowmax_native: layouts, allocations, and what is copied and why.

Calls of the fast path go past torch's dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import count_rows, rows_of, statistics_dtype
from ..cpu_common.results import new_result
from ..fused_norms import Backward, Forward, FusedNorms, Results
from . import extension


def _forward(norm: Forward) -> Results:
    x, residual, weight, bias, eps, dropout_p, seed, subtract_mean = norm
    shape, rows = x.shape, count_rows(x)
    dtype = statistics_dtype(x.dtype)
    y = new_result(x, shape)
    rstd = x.new_empty(shape[:-1], dtype=dtype)
    mean = torch.empty_like(rstd) if subtract_mean else None
    x, x_row = rows_of(x)
    total, residual_row = None, 0
    if residual is not None:
        total = new_result(x, shape)
        residual, residual_row = rows_of(residual)
    torch.ops.rowmax_native.norm_forward.default(
        *(x, x_row, residual, residual_row, _parameter(weight, dtype), _parameter(bias, dtype)),
        *(y, total, mean, rstd, rows, shape[-1], eps, dropout_p, seed),
    )
    return y, y if total is None else total, rstd if mean is None else mean, rstd


def _backward(norm: Backward) -> Results:
    x, grad_y, grad_total, mean, rstd, weight, bias, dropout_p, seed = norm
    shape, columns, rows = x.shape, x.shape[-1], count_rows(x)
    dtype = statistics_dtype(x.dtype)
    d_total = new_result(x, shape)
    d_x = new_result(x, shape) if dropout_p > 0.0 else None
    d_weight = None if weight is None else x.new_empty(columns, dtype=dtype)
    d_bias = None if bias is None else x.new_empty(columns, dtype=dtype)
    x, x_row = rows_of(x)
    grad_y, grad_y_row = rows_of(grad_y.to(x.dtype))
    grad_total_row = 0
    if grad_total is not None:
        grad_total, grad_total_row = rows_of(grad_total.to(x.dtype))
    torch.ops.rowmax_native.norm_backward.default(
        *(x, x_row, grad_y, grad_y_row, grad_total, grad_total_row),
        *(None if mean is None else mean.contiguous(), rstd.contiguous()),
        *(_parameter(weight, dtype), d_total, d_x, d_weight, d_bias),
        *(rows, columns, dropout_p, seed),
    )
    return (
        x.new_empty(0) if d_x is None else d_x,
        d_total,
        x.new_empty(0) if d_weight is None or weight is None else d_weight.to(weight.dtype),
        x.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _parameter(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(N,), contiguous and of `dtype`: small beside x, so that kernels need no case for it."""
    return None if parameter is None else parameter.detach().to(dtype).contiguous()


norms = FusedNorms(_forward, _backward)


def fast_path_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    subtract_mean: bool,
) -> tuple[Tensor, Tensor] | None:
    """y and total of arguments that nobody has checked; None where the general way is needed."""
    found: tuple[Tensor, Tensor] | None
    found = extension().fast_path_norm(x, residual, weight, bias, eps, subtract_mean)
    return found
