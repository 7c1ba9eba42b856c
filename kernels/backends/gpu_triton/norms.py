"""From a norm's problem to its kernels: layouts, allocations and grids."""

from __future__ import annotations

from torch import Tensor

from ...ops.layout import count_rows, rows_of, statistics_dtype
from ..fused_norms import FusedNorms
from .arguments import beside, contiguous, dropout, on_device
from .norms_backward import average_rows, differentiate, sum_chunks
from .norms_forward import normalise, normalise_blocks
from .rows import backward_tile, chunk_rows, forward_tile, stages

# The tile in which partial sums are added: many loads in flight, and blocks of columns enough.
_SUMMED_CHUNKS, _SUMMED_COLUMNS = 128, 32


def _forward(
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
    shape, columns, rows = x.shape, x.shape[-1], count_rows(x)
    y = x.new_empty(shape)
    rstd = x.new_empty(shape[:-1], dtype=statistics_dtype(x.dtype))
    mean = x.new_empty(rstd.shape, dtype=rstd.dtype) if subtract_mean else rstd
    total = y if residual is None else x.new_empty(shape)
    if not x.numel():
        return y, total, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    x, x_row = rows_of(x)
    residual_row = 0
    if residual is not None:
        residual, residual_row = rows_of(residual)
    arguments = (
        *(x, x_row, residual, residual_row, contiguous(weight), contiguous(bias)),
        *(y, None if residual is None else total, mean if subtract_mean else None, rstd),
        *(rows, columns, eps, *dropout(dropout_p, beside(seed, x))),
    )
    tile = forward_tile(columns, x.dtype)
    with on_device(x):
        if columns <= tile.columns:
            grid = (-(-rows // tile.rows),)
            normalise[grid](*arguments, tile.rows, tile.columns, num_warps=tile.warps)
        else:
            normalise_blocks[(rows,)](*arguments, tile.columns, num_warps=tile.warps)
    return y, total, mean, rstd


def _backward(
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
    shape, columns, rows = x.shape, x.shape[-1], count_rows(x)
    d_total = x.new_empty(shape)
    d_x = x.new_empty(shape if dropout_p > 0.0 else 0)
    # Without any row there is no chunk: the gradients are the zeros of an empty sum.
    new = x.new_empty if x.numel() else x.new_zeros
    d_weight = x.new_empty(0) if weight is None else new(columns, dtype=weight.dtype)
    d_bias = x.new_empty(0) if bias is None else new(columns, dtype=bias.dtype)
    if not x.numel():
        return d_x, d_total, d_weight, d_bias
    x, x_row = rows_of(x)
    grad_y, grad_y_row = rows_of(grad_y)
    grad_total_row = 0
    if grad_total is not None:
        grad_total, grad_total_row = rows_of(grad_total)
    rstd, mean, scale = rstd.contiguous(), contiguous(mean), contiguous(weight)
    tile = backward_tile(columns, x.dtype)
    blocks, chunk = -(-columns // tile.columns), chunk_rows(rows, tile)
    chunks = -(-rows // chunk)
    inputs = (x, x_row, grad_y, grad_y_row)
    weight_partials, bias_partials = (
        None if parameter is None else rstd.new_empty((chunks, columns))
        for parameter in (weight, bias)
    )
    with on_device(x):
        means = None
        if blocks > 1:
            means = rstd.new_empty((rows, 2))
            average_rows[(rows,)](
                *(*inputs, mean, rstd, scale, means, rows, columns),
                tile.columns,
                num_warps=tile.warps,
            )
        differentiate[(chunks * blocks,)](
            *(*inputs, grad_total, grad_total_row, mean, rstd, scale, means),
            *(d_total, d_x if dropout_p > 0.0 else None, weight_partials, bias_partials),
            *(rows, columns, chunk, *dropout(dropout_p, beside(seed, x)), tile.rows, tile.columns),
            stages(tile, x.dtype, 2 if grad_total is None else 3),
            num_warps=tile.warps,
        )
        if weight is not None or bias is not None:
            sum_chunks[(-(-columns // _SUMMED_COLUMNS),)](
                *(weight_partials, bias_partials),
                *(None if weight is None else d_weight, None if bias is None else d_bias),
                *(chunks, columns, _SUMMED_CHUNKS, _SUMMED_COLUMNS),
                num_warps=8,
            )
    return d_x, d_total, d_weight, d_bias


_norms = FusedNorms(_forward, _backward)
layer_norm = _norms.layer_norm
layer_norm_backward = _norms.layer_norm_backward
add_layer_norm = _norms.add_layer_norm
add_layer_norm_backward = _norms.add_layer_norm_backward
rms_norm = _norms.rms_norm
rms_norm_backward = _norms.rms_norm_backward
