"""The forward kernels of layer norm, add-and-norm and RMS norm.

    total = residual + x * keep / (1 - p)                       only in add-and-norm
    mean = sum(row) / N
    shift, square = sum(row - mean) / N, sum((row - mean)^2) / N
    rstd = 1 / sqrt(square - shift^2 + eps)
    y = ((row - mean) - shift) * rstd * weight + bias

`shift` is the rounding error of `mean`: with it the statistics hold where the mean is thousands of
deviations (Chan, Golub & LeVeque 1983, 'corrected two-pass algorithm'). RMS norm is the same with
mean = shift = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import load_seed, philox4x32

NORM_STREAM = tl.constexpr(0x6E6F726D)
DO_NOT_SPECIALIZE = ["rows", "threshold", "seed"]


@triton.jit
def draw_factors(dropout, row, first, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """The dropout factors of a tile, `keep_scale` or 0: (ROWS, COLUMNS).

    dropout: (threshold, keep_scale, seed). row (ROWS, 1) int64; `first`, the first column, is a
    multiple of 4, one for the tile or (ROWS, 1).
    """
    threshold, keep_scale, seed = dropout
    zero = tl.zeros((row.shape[0], COLUMNS // 4), tl.uint32)
    group = (first // 4 + tl.arange(0, COLUMNS // 4)[None, :]).to(tl.uint32) + zero
    low, high = row.to(tl.uint32) + zero, (row >> 32).to(tl.uint32) + zero
    w0, w1, w2, w3 = philox4x32(group, low, high, zero + NORM_STREAM, load_seed(seed))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(row.shape[0], COLUMNS)
    kept, dropped = tl.full((1, 1), keep_scale, dtype), tl.zeros((1, 1), dtype)
    return tl.where(words >= tl.full((1, 1), threshold, tl.uint32), kept, dropped)


@triton.jit
def _load_tile(
    x, x_row, addend, dropout, row, first, rows, columns, COLUMNS: tl.constexpr, dtype: tl.constexpr
):
    """A tile of the rows to be normalised, zeros outside; their sum is stored on the way.

    addend: (residual, residual_row, total).
    """
    residual, residual_row, total = addend
    column = first + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(dtype)
    if residual is not None:
        if dropout[2] is not None:
            value = value * draw_factors(dropout, row, first, COLUMNS, dtype)
        value += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(dtype)
        # The backward pass will see the stored sum: what is normalised must be the same.
        stored = value.to(total.dtype.element_ty)
        tl.store(total + row * columns + column, stored, mask=inside)
        value = stored.to(dtype)
    return value


@triton.jit
def _inverse_deviation(shift, square, eps, dtype: tl.constexpr):
    variance = square - shift * shift
    variance = tl.where(variance < 0.0, 0.0, variance)  # not `maximum`, which loses NaN
    return 1.0 / tl.sqrt(variance + tl.full((1, 1), eps, dtype))


@triton.jit
def _store_normal(
    deviation, shift, rstd, weight, bias, y, row, first, rows, columns, COLUMNS: tl.constexpr
):
    """y = (deviation - shift) * rstd * weight + bias, for a tile."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    result = (deviation - shift) * rstd
    if weight is not None:
        result *= tl.load(weight + column, mask=column < columns, other=0.0).to(result.dtype)
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(result.dtype)
    inside = (row < rows) & (column < columns)
    tl.store(y + row * columns + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def norm_forward(
    x,
    x_row,
    residual,
    residual_row,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    columns,
    eps: tl.float64,
    threshold: tl.uint32,
    keep_scale: tl.float64,
    seed,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows that fit a tile: each is read once.

    x, residual, y, total (rows, columns); weight, bias (columns,); mean, rstd (rows,). x and
    residual have a row stride of their own, in elements; all else is contiguous. Without a residual
    x itself is normalised; without `mean` it is taken as 0. Without a seed nothing is dropped.
    Program p has rows p * ROWS and following.
    """
    dtype: tl.constexpr = rstd.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    addend, dropout = (residual, residual_row, total), (threshold, keep_scale, seed)
    value = _load_tile(x, x_row, addend, dropout, row, 0, rows, columns, COLUMNS, dtype)
    count = tl.full((1, 1), columns, dtype)
    shift = tl.zeros((1, 1), dtype)
    if mean is not None:
        row_mean = tl.sum(value, axis=1, keep_dims=True) / count
        value = tl.where(tl.arange(0, COLUMNS)[None, :] < columns, value - row_mean, 0.0)
        shift = tl.sum(value, axis=1, keep_dims=True) / count
        tl.store(mean + row, row_mean + shift, mask=row < rows)
    square = tl.sum(value * value, axis=1, keep_dims=True) / count
    row_rstd = _inverse_deviation(shift, square, eps, dtype)
    tl.store(rstd + row, row_rstd, mask=row < rows)
    _store_normal(value, shift, row_rstd, weight, bias, y, row, 0, rows, columns, COLUMNS)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def norm_forward_blocked(
    x,
    x_row,
    residual,
    residual_row,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    columns,
    eps: tl.float64,
    threshold: tl.uint32,
    keep_scale: tl.float64,
    seed,
    COLUMNS: tl.constexpr,
):
    """Longer rows, one a program, read twice in blocks of COLUMNS; arguments as in `norm_forward`.

    `mean` in the formulas is that of the first block here, and `shift` all that the row's mean
    differs by. Where that is much, so is the variance: it is at least shift^2 / (blocks - 1).
    """
    dtype: tl.constexpr = rstd.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    addend, dropout = (residual, residual_row, total), (threshold, keep_scale, seed)
    count = tl.full((1, 1), columns, dtype)
    anchor, shift = tl.zeros((1, 1), dtype), tl.zeros((1, 1), dtype)
    sums, squares = tl.zeros((1, COLUMNS), dtype), tl.zeros((1, COLUMNS), dtype)
    for first in range(0, columns, COLUMNS):
        value = _load_tile(x, x_row, addend, dropout, row, first, rows, columns, COLUMNS, dtype)
        if mean is not None:
            if first == 0:
                anchor = tl.sum(value, axis=1, keep_dims=True) / COLUMNS
            column = first + tl.arange(0, COLUMNS)[None, :]
            value = tl.where(column < columns, value - anchor, 0.0)
            sums += value
        squares += value * value
    if mean is not None:
        shift = tl.sum(sums, axis=1, keep_dims=True) / count
        tl.store(mean + row, anchor + shift)
    square = tl.sum(squares, axis=1, keep_dims=True) / count
    row_rstd = _inverse_deviation(shift, square, eps, dtype)
    tl.store(rstd + row, row_rstd)
    if residual is not None:
        tl.debug_barrier()  # the sum is read by other threads than stored it
        x, x_row = total, columns
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(x + row * x_row + column, mask=column < columns, other=0.0).to(dtype)
        value -= anchor
        _store_normal(value, shift, row_rstd, weight, bias, y, row, first, rows, columns, COLUMNS)
