"""From a norm's problem to its kernels: layouts, allocations, and what is copied and why."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import count_rows, rows_of, statistics_dtype
from ..cpu_common.results import new_result
from ..fused_norms import Backward, Forward, FusedNorms, Results
from .fields import dropout_fields
from .gemm import lanes_in
from .norm_backward import BACKWARD
from .norm_backward import scratch_elements as backward_scratch
from .norm_forward import FORWARD
from .norm_forward import scratch_bytes as forward_scratch
from .rows import chunk_rows, task_rows


def _forward(norm: Forward) -> Results:
    x, residual, weight, bias, eps, dropout_p, seed, subtract_mean = norm
    shape, columns = x.shape, x.shape[-1]
    rows = count_rows(x)
    y = new_result(x, shape)
    dtype = statistics_dtype(x.dtype)
    rstd = x.new_empty(shape[:-1], dtype=dtype)
    mean = torch.empty_like(rstd) if subtract_mean else rstd
    x, x_row = rows_of(x)
    total, residual_address, residual_row = y, 0, 0
    if residual is not None:
        total = new_result(x, shape)
        residual, residual_row = rows_of(residual)
        residual_address = residual.data_ptr()
    weight, bias = _parameter(weight, 1.0, x, dtype), _parameter(bias, 0.0, x, dtype)
    task = task_rows(columns)
    FORWARD.plan(
        x.dtype,
        -(-rows // task),
        forward_scratch(dtype.itemsize),
        {
            "x": x.data_ptr(),
            "x_row": x_row,
            "residual": residual_address,
            "residual_row": residual_row,
            "weight": weight.data_ptr(),
            "bias": bias.data_ptr(),
            "y": y.data_ptr(),
            "total": total.data_ptr(),
            "mean": mean.data_ptr(),
            "rstd": rstd.data_ptr(),
            "rows": rows,
            "columns": columns,
            "task_rows": task,
            "subtract_mean": subtract_mean,
            "eps": eps,
            **dropout_fields(dropout_p, seed),
        },
    ).run()
    return y, total, mean, rstd


def _backward(norm: Backward) -> Results:
    x, grad_y, grad_total, mean, rstd, weight, bias, dropout_p, seed = norm
    shape, columns = x.shape, x.shape[-1]
    rows = count_rows(x)
    d_total = new_result(x, shape)
    dropout = dropout_fields(dropout_p, seed)
    d_x = new_result(x, shape) if dropout["dropout"] else x.new_empty(0)
    dtype = statistics_dtype(x.dtype)
    d_weight = x.new_empty(0 if weight is None else columns, dtype=dtype)
    d_bias = x.new_empty(0 if bias is None else columns, dtype=dtype)
    x, x_row = rows_of(x)
    grad_y, grad_y_row = rows_of(grad_y.to(x.dtype))
    grad_total_address, grad_total_row = 0, 0
    if grad_total is not None:
        grad_total, grad_total_row = rows_of(grad_total.to(x.dtype))
        grad_total_address = grad_total.data_ptr()
    rstd = rstd.contiguous()
    mean = rstd if mean is None else mean.contiguous()
    scale = _parameter(weight, 1.0, x, dtype)
    chunk = chunk_rows(rows, columns)
    # Without any row one chunk still writes the zeros of d_weight and d_bias.
    chunks = max(1, -(-rows // chunk))
    lanes = lanes_in(dtype)
    partials = chunks * 2 * (-(-columns // lanes) * lanes) * dtype.itemsize
    BACKWARD.plan(
        x.dtype,
        min(chunks, max(1, -(-rows // task_rows(columns)))),
        backward_scratch() * dtype.itemsize,
        {
            "x": x.data_ptr(),
            "x_row": x_row,
            "grad_y": grad_y.data_ptr(),
            "grad_y_row": grad_y_row,
            "grad_total": grad_total_address,
            "grad_total_row": grad_total_row,
            "mean": mean.data_ptr(),
            "rstd": rstd.data_ptr(),
            "weight": scale.data_ptr(),
            "d_total": d_total.data_ptr(),
            "d_x": d_x.data_ptr(),
            "d_weight": d_weight.data_ptr(),
            "d_bias": d_bias.data_ptr(),
            "rows": rows,
            "columns": columns,
            "chunks": chunks,
            "chunk_rows": chunk,
            "subtract_mean": mean is not rstd,
            **dropout,
        },
        partials,
    ).run()
    if weight is not None:
        d_weight = d_weight.to(weight.dtype)
    if bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return d_x, d_total, d_weight, d_bias


def _parameter(parameter: Tensor | None, absent: float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,), contiguous and of `dtype`: small beside x, so that kernels need no case for it."""
    if parameter is None:
        return x.new_full((x.shape[-1],), absent, dtype=dtype)
    if parameter.dtype == dtype and parameter.is_contiguous():
        return parameter
    return parameter.to(dtype).contiguous()


norms = FusedNorms(_forward, _backward)
