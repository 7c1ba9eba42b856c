"""The backward kernel of layer norm, add-and-norm and RMS norm: columns in the lanes, row by row.

With x^ = (x - mean) * rstd and g = dy * weight, both never stored:

    d_weight = sum over rows of dy * x^          d_bias = sum over rows of dy
    d_total = rstd * (g - mean(g) - x^ * mean(g * x^))  (+ grad_total, in add-and-norm)
    d_x = d_total * keep / (1 - p)               only in add-and-norm with dropout

RMS norm is the same without mean and mean(g). Rows are summed in chunks whose number follows from
the shape alone, and the chunks in their order, so that the bits do not depend on the threads.
"""

from __future__ import annotations

from .call import Kernel, read
from .jit import jit
from .microkernel import lanes_of
from .norms_forward import draw_factors, fill
from .simd import (
    add_lanes,
    cast,
    finish_task,
    integers_at,
    load,
    load_first,
    multiply_add,
    pointer,
    splat,
    store,
    store_first,
    take_ticket,
)


@jit
def _row_means(x, grad_y, mean, rstd, weight, columns, count, zero):
    """The means of g and of g * x^ over a row."""
    lanes = lanes_of(zero)
    means, scales = splat(mean), splat(rstd)
    s0 = s1 = s2 = s3 = splat(zero)
    q0 = q1 = q2 = q3 = splat(zero)
    c = 0
    while c + 4 * lanes <= columns:
        g0 = load(grad_y + c) * load(weight + c)
        g1 = load(grad_y + (c + lanes)) * load(weight + (c + lanes))
        g2 = load(grad_y + (c + 2 * lanes)) * load(weight + (c + 2 * lanes))
        g3 = load(grad_y + (c + 3 * lanes)) * load(weight + (c + 3 * lanes))
        s0, s1, s2, s3 = s0 + g0, s1 + g1, s2 + g2, s3 + g3
        q0 = multiply_add(g0, (load(x + c) - means) * scales, q0)
        q1 = multiply_add(g1, (load(x + (c + lanes)) - means) * scales, q1)
        q2 = multiply_add(g2, (load(x + (c + 2 * lanes)) - means) * scales, q2)
        q3 = multiply_add(g3, (load(x + (c + 3 * lanes)) - means) * scales, q3)
        c += 4 * lanes
    while c < columns:
        rest = columns - c
        g0 = load_first(grad_y + c, rest) * load_first(weight + c, rest)
        s0 = s0 + g0
        q0 = multiply_add(g0, (load_first(x + c, rest) - means) * scales, q0)
        c += lanes
    first = add_lanes((s0 + s1) + (s2 + s3)) / count
    second = add_lanes((q0 + q1) + (q2 + q3)) / count
    return first, second


@jit
def _differentiate_row(
    x, grad_y, mean, rstd, g_mean, gx_mean, weight, d_total, d_weight, d_bias, columns
):
    """d_total of one row, and its terms added to d_weight and d_bias (whole vectors)."""
    lanes = lanes_of(rstd)
    means, scales = splat(mean), splat(rstd)
    g_means, gx_means = splat(cast(g_mean * rstd, rstd)), splat(cast(-gx_mean * rstd, rstd))
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        d_y = load(grad_y + c)
        x_hat = (load(x + c) - means) * scales
        store(d_weight + c, multiply_add(d_y, x_hat, load(d_weight + c)))
        store(d_bias + c, load(d_bias + c) + d_y)
        d_x = d_y * load(weight + c) * scales - g_means
        store(d_total + c, multiply_add(x_hat, gx_means, d_x))
    if rest > 0:
        c = columns - rest
        d_y = load_first(grad_y + c, rest)
        x_hat = (load_first(x + c, rest) - means) * scales
        store(d_weight + c, multiply_add(d_y, x_hat, load(d_weight + c)))
        store(d_bias + c, load(d_bias + c) + d_y)
        d_x = d_y * load_first(weight + c, rest) * scales - g_means
        store_first(d_total + c, multiply_add(x_hat, gx_means, d_x), rest)


@jit
def _add_gradient(d_total, grad_total, columns, zero):
    """d_total += grad_total, one row."""
    lanes = lanes_of(zero)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        store(d_total + c, load(d_total + c) + load(grad_total + c))
    if rest > 0:
        c = columns - rest
        total = load_first(d_total + c, rest) + load_first(grad_total + c, rest)
        store_first(d_total + c, total, rest)


@jit
def _drop_row(d_total, factors, d_x, columns, zero):
    """d_x = d_total * factors, one row."""
    lanes = lanes_of(zero)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        store(d_x + c, load(d_total + c) * load(factors + c))
    if rest > 0:
        c = columns - rest
        store_first(d_x + c, load_first(d_total + c, rest) * load(factors + c), rest)


@jit
def _sum_chunks(partials, chunk_stride, chunks, target, columns, zero):
    """target = the sum of all chunks' partial sums in their order, with Kahan's compensation."""
    lanes = lanes_of(zero)
    for c in range(0, columns, lanes):
        total = lost = splat(zero)
        for chunk in range(chunks):
            term = load(partials + (chunk * chunk_stride + c)) - lost
            grown = total + term
            lost = (grown - total) - term
            total = grown
        store_first(target + c, total, columns - c)


def differentiate(argument):
    """x, grad_y, grad_total, d_total, d_x (rows, columns); weight, d_weight, d_bias (columns,).

    x, grad_y and grad_total have a row stride of their own, in elements; all else is contiguous.
    mean, rstd (rows,). grad_total, d_x, d_weight and d_bias may be absent (0); without `centred`
    mean is not read. partials (chunks, 2, columns rounded up to whole vectors): every chunk's
    d_weight and d_bias. Scratch: one row of dropout's factors, rounded up to four vectors.
    """
    call = read(argument)
    zero = call.zero
    tickets = integers_at(call.tickets)
    thread = take_ticket(tickets + 1)
    columns = call.columns
    count = float(columns)
    centred = call.centred != 0
    weight = pointer(call.weight, zero)
    factors = pointer(call.scratch + thread * call.scratch_bytes, zero)
    lanes = lanes_of(zero)
    padded = (columns + lanes - 1) // lanes * lanes
    while True:
        chunk = take_ticket(tickets)
        if chunk >= call.chunks:
            break
        d_weight = pointer(call.partials, zero) + chunk * 2 * padded
        d_bias = d_weight + padded
        fill(d_weight, 2 * padded, zero)
        first = chunk * call.chunk_rows
        for index in range(first, min(first + call.chunk_rows, call.rows)):
            x = pointer(call.x, zero) + index * call.x_row
            grad_y = pointer(call.grad_y, zero) + index * call.grad_y_row
            d_total = pointer(call.d_total, zero) + index * columns
            mean = zero
            if centred:
                mean = pointer(call.mean, zero)[index]
            rstd = pointer(call.rstd, zero)[index]
            g_mean, gx_mean = _row_means(x, grad_y, mean, rstd, weight, columns, count, zero)
            if not centred:
                g_mean = 0.0
            _differentiate_row(
                x, grad_y, mean, rstd, g_mean, gx_mean, weight, d_total, d_weight, d_bias, columns
            )
            if call.grad_total != 0:
                grad_total = pointer(call.grad_total, zero) + index * call.grad_total_row
                _add_gradient(d_total, grad_total, columns, zero)
            if call.d_x != 0:
                keep_scale = cast(call.keep_scale, zero)
                draw_factors(factors, index, columns, call.threshold, keep_scale, call.seed, zero)
                d_x = pointer(call.d_x, zero) + index * columns
                _drop_row(d_total, factors, d_x, columns, zero)
        if finish_task(tickets + 2) == call.chunks - 1:
            partials = pointer(call.partials, zero)
            if call.d_weight != 0:
                target = pointer(call.d_weight, zero)
                _sum_chunks(partials, 2 * padded, call.chunks, target, columns, zero)
            if call.d_bias != 0:
                target = pointer(call.d_bias, zero)
                _sum_chunks(partials + padded, 2 * padded, call.chunks, target, columns, zero)


BACKWARD = Kernel(
    differentiate,
    (
        *("x", "x_row", "grad_y", "grad_y_row", "grad_total", "grad_total_row"),
        *("mean", "rstd", "weight", "d_total", "d_x", "partials", "d_weight", "d_bias"),
        *("rows", "columns", "chunks", "chunk_rows", "centred"),
        *("threshold", "seed"),
    ),
    ("keep_scale",),
)
