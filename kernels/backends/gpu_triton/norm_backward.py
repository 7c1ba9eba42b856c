"""The backward kernels of layer norm, add-and-norm and RMS norm.

With x^ = (x - mean) * rstd and g = dy * weight, both never stored:

    d_weight = sum over rows of dy * x^          d_bias = sum over rows of dy
    d_total = rstd * (g - mean(g) - x^ * mean(g * x^))  (+ grad_total, in add-and-norm)
    d_x = d_total * keep / (1 - p)               only in add-and-norm with dropout

RMS norm is the same without mean and mean(g). Rows are summed in chunks whose number follows from
the shape alone, and the chunks in a fixed order, so that the bits are the same on every GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .norm_forward import draw_factors


@triton.jit
def _load_terms(inputs, statistics, scale, row, column, rows, columns, dtype: tl.constexpr):
    """x^, dy and g of a tile; dy and g are zeros outside.

    inputs: (x, x_row, grad_y, grad_y_row); statistics: (mean, rstd); scale: the weights or None.
    """
    x, x_row, grad_y, grad_y_row = inputs
    mean, rstd = statistics
    inside = (row < rows) & (column < columns)
    x_hat = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(dtype)
    d_y = tl.load(grad_y + row * grad_y_row + column, mask=inside, other=0.0).to(dtype)
    if mean is not None:
        x_hat -= tl.load(mean + row, mask=row < rows, other=0.0)
    row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)
    g = d_y
    if scale is not None:
        g = d_y * scale
    return x_hat * row_rstd, d_y, g, row_rstd


@triton.jit
def _load_weight(weight, column, columns, dtype: tl.constexpr):
    scale = None
    if weight is not None:
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(dtype)
    return scale


@triton.jit(do_not_specialize=["rows"])
def norm_backward_row_means(
    x, x_row, grad_y, grad_y_row, mean, rstd, weight, means, rows, columns, COLUMNS: tl.constexpr
):
    """mean(g) and mean(g * x^) of rows that don't fit a tile, one a program: means (rows, 2)."""
    dtype: tl.constexpr = rstd.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    sums, products = tl.zeros((1, COLUMNS), dtype), tl.zeros((1, COLUMNS), dtype)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        scale = _load_weight(weight, column, columns, dtype)
        x_hat, _, g, _ = _load_terms(
            (x, x_row, grad_y, grad_y_row), (mean, rstd), scale, row, column, rows, columns, dtype
        )
        sums += g
        products += g * x_hat
    count = tl.full((1, 1), columns, dtype)
    tl.store(means + row * 2, tl.sum(sums, axis=1, keep_dims=True) / count)
    tl.store(means + row * 2 + 1, tl.sum(products, axis=1, keep_dims=True) / count)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "threshold", "seed"])
def norm_backward(
    x,
    x_row,
    grad_y,
    grad_y_row,
    grad_total,
    grad_total_row,
    mean,
    rstd,
    weight,
    means,
    d_total,
    d_x,
    weight_partials,
    bias_partials,
    rows,
    columns,
    chunk_rows,
    threshold: tl.uint32,
    keep_scale: tl.float64,
    seed,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk of rows and one block of columns a program, in tiles of ROWS.

    x, grad_y, grad_total, d_total, d_x (rows, columns); weight (columns,); mean, rstd (rows,). x,
    grad_y and grad_total have a row stride of their own, in elements; all else is contiguous.
    means (rows, 2) of `norm_backward_row_means`; without it a block must be a whole row. Partials
    (chunks, columns): every chunk's d_weight and d_bias. Absent ones are None; RMS norm has no
    `mean`. Program p has block p % blocks of chunk p // blocks, a multiple of ROWS rows.
    """
    dtype: tl.constexpr = rstd.dtype.element_ty
    blocks = tl.cdiv(columns, COLUMNS)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    count = tl.full((1, 1), columns, dtype)
    scale = _load_weight(weight, column, columns, dtype)
    d_weight, d_bias = tl.zeros((ROWS, COLUMNS), dtype), tl.zeros((ROWS, COLUMNS), dtype)
    for step in tl.range(0, chunk_rows, ROWS, num_stages=STAGES):
        row = chunk * chunk_rows + step + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)
        x_hat, d_y, g, row_rstd = _load_terms(
            (x, x_row, grad_y, grad_y_row), (mean, rstd), scale, row, column, rows, columns, dtype
        )
        if weight_partials is not None:
            d_weight += d_y * x_hat
        if means is None:
            gx_mean = tl.sum(g * x_hat, axis=1, keep_dims=True) / count
        else:
            gx_mean = tl.load(means + row * 2 + 1, mask=row < rows, other=0.0)
        d_sum = g - x_hat * gx_mean
        if mean is not None:
            if means is None:
                d_sum -= tl.sum(g, axis=1, keep_dims=True) / count
            else:
                d_sum -= tl.load(means + row * 2, mask=row < rows, other=0.0)
        if bias_partials is not None:
            d_bias += d_y
        d_sum *= row_rstd
        if grad_total is not None:
            at = grad_total + row * grad_total_row + column
            d_sum += tl.load(at, mask=inside, other=0.0).to(dtype)
        at = row * columns + column
        tl.store(d_total + at, d_sum.to(d_total.dtype.element_ty), mask=inside)
        if d_x is not None:
            start = first
            if means is None:
                # Words that are drawn while the inputs are still needed, as the compiler would
                # order it, push them out of registers; tiles of two rows have room for both.
                if ROWS != 2:
                    tl.debug_barrier()
                # Words that depend on the columns alone would stay in registers from row to row,
                # and push others out of them: in a whole row it is made to follow from the row.
                start = tl.where(row < rows, first, 0)
            factors = draw_factors((threshold, keep_scale, seed), row, start, COLUMNS, dtype)
            tl.store(d_x + at, (d_sum * factors).to(d_x.dtype.element_ty), mask=inside)
    at = chunk * columns + column
    if weight_partials is not None:
        d_weight = tl.sum(d_weight, axis=0, keep_dims=True)
        tl.store(weight_partials + at, d_weight, mask=column < columns)
    if bias_partials is not None:
        d_bias = tl.sum(d_bias, axis=0, keep_dims=True)
        tl.store(bias_partials + at, d_bias, mask=column < columns)


@triton.jit
def _add_chunks(partials, total, chunk, column, chunks, columns):
    inside = (chunk < chunks) & (column < columns)
    return total + tl.load(partials + chunk * columns + column, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["chunks"])
def norm_backward_sum_partials(
    weight_partials,
    bias_partials,
    d_weight,
    d_bias,
    chunks,
    columns,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_weight, d_bias (columns,): the sums of the partials (chunks, columns), or None.

    Program p has the columns p * COLUMNS and following.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if d_weight is not None:
        weight_sum = tl.zeros((CHUNKS, COLUMNS), weight_partials.dtype.element_ty)
    if d_bias is not None:
        bias_sum = tl.zeros((CHUNKS, COLUMNS), bias_partials.dtype.element_ty)
    for first in range(0, chunks, CHUNKS):
        chunk = (first + tl.arange(0, CHUNKS)[:, None]).to(tl.int64)
        if d_weight is not None:
            weight_sum = _add_chunks(weight_partials, weight_sum, chunk, column, chunks, columns)
        if d_bias is not None:
            bias_sum = _add_chunks(bias_partials, bias_sum, chunk, column, chunks, columns)
    if d_weight is not None:
        total = tl.sum(weight_sum, axis=0, keep_dims=True).to(d_weight.dtype.element_ty)
        tl.store(d_weight + column, total, mask=column < columns)
    if d_bias is not None:
        total = tl.sum(bias_sum, axis=0, keep_dims=True).to(d_bias.dtype.element_ty)
        tl.store(d_bias + column, total, mask=column < columns)
