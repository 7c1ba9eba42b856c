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
from .norms_forward import FACTOR_BLOCK, draw_factors, fill
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

# Long rows are taken together, and d_weight and d_bias read and written once for all of them. Short
# ones find both in the first cache, and one after another they make longer streams of memory.
GROUP = 4
_GROUPED_COLUMNS = 2048


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
def _spread(statistics):
    """A row's four statistics, each in all lanes."""
    mean, rstd = splat(statistics[0]), splat(statistics[1])
    return mean, rstd, splat(statistics[2]), splat(statistics[3])


@jit
def _row_terms(x, d_y, weight, spread):
    """x^ and d_total of one vector."""
    mean, rstd, g_mean, gx_mean = spread
    x_hat = (x - mean) * rstd
    return x_hat, multiply_add(x_hat, gx_mean, d_y * weight * rstd - g_mean)


@jit
def _differentiate_row(x, grad_y, statistics, weight, d_total, d_weight, d_bias, columns):
    """d_total of one row, and its terms added to d_weight and d_bias (whole vectors)."""
    lanes = lanes_of(x)
    spread = _spread(statistics)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        d_y = load(grad_y + c)
        x_hat, d_x = _row_terms(load(x + c), d_y, load(weight + c), spread)
        store(d_total + c, d_x)
        store(d_weight + c, multiply_add(d_y, x_hat, load(d_weight + c)))
        store(d_bias + c, load(d_bias + c) + d_y)
    if rest > 0:
        c = columns - rest
        d_y = load_first(grad_y + c, rest)
        x_hat, d_x = _row_terms(load_first(x + c, rest), d_y, load_first(weight + c, rest), spread)
        store_first(d_total + c, d_x, rest)
        store(d_weight + c, multiply_add(d_y, x_hat, load(d_weight + c)))
        store(d_bias + c, load(d_bias + c) + d_y)


@jit
def _differentiate_group(
    x, x_row, grad_y, grad_y_row, statistics, weight, d_total, d_weight, d_bias, columns
):
    """The same for GROUP rows at once."""
    lanes = lanes_of(x)
    x1, x2, x3 = x + x_row, x + 2 * x_row, x + 3 * x_row
    y1, y2, y3 = grad_y + grad_y_row, grad_y + 2 * grad_y_row, grad_y + 3 * grad_y_row
    t1, t2, t3 = d_total + columns, d_total + 2 * columns, d_total + 3 * columns
    s0, s1 = _spread(statistics), _spread(statistics + 4)
    s2, s3 = _spread(statistics + 8), _spread(statistics + 12)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        w = load(weight + c)
        d0, d1, d2, d3 = load(grad_y + c), load(y1 + c), load(y2 + c), load(y3 + c)
        h0, g0 = _row_terms(load(x + c), d0, w, s0)
        h1, g1 = _row_terms(load(x1 + c), d1, w, s1)
        h2, g2 = _row_terms(load(x2 + c), d2, w, s2)
        h3, g3 = _row_terms(load(x3 + c), d3, w, s3)
        store(d_total + c, g0)
        store(t1 + c, g1)
        store(t2 + c, g2)
        store(t3 + c, g3)
        products = multiply_add(d0, h0, d1 * h1) + multiply_add(d2, h2, d3 * h3)
        store(d_weight + c, load(d_weight + c) + products)
        store(d_bias + c, load(d_bias + c) + ((d0 + d1) + (d2 + d3)))
    if rest > 0:
        c = columns - rest
        for r in range(GROUP):
            _differentiate_row(
                x + (r * x_row + c),
                grad_y + (r * grad_y_row + c),
                statistics + 4 * r,
                weight + c,
                d_total + (r * columns + c),
                d_weight + c,
                d_bias + c,
                rest,
            )


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
    """d_x = d_total * factors, for at most FACTOR_BLOCK columns."""
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


@jit
def _finish_row(call, row, factors, zero):
    """grad_total added to d_total, and d_x from it, where they are asked for."""
    columns = call.columns
    d_total = pointer(call.d_total, zero) + row * columns
    grad_total = pointer(call.grad_total, zero) + row * call.grad_total_row
    d_x = pointer(call.d_x, zero) + row * columns
    keep_scale = cast(call.keep_scale, zero)
    for c in range(0, columns, FACTOR_BLOCK):
        width = min(FACTOR_BLOCK, columns - c)
        if call.grad_total != 0:
            _add_gradient(d_total + c, grad_total + c, width, zero)
        if call.d_x != 0:
            draw_factors(factors, row, c, width, call.threshold, keep_scale, call.seed, zero)
            _drop_row(d_total + c, factors, d_x + c, width, zero)


def differentiate(argument):
    """x, grad_y, grad_total, d_total, d_x (rows, columns); weight, d_weight, d_bias (columns,).

    x, grad_y and grad_total have a row stride of their own, in elements; all else is contiguous.
    mean, rstd (rows,). grad_total, d_x, d_weight and d_bias may be absent (0); without `centred`
    mean is not read. partials (chunks, 2, columns rounded up to whole vectors): every chunk's
    d_weight and d_bias. Scratch: FACTOR_BLOCK elements, and four for each of GROUP rows: mean,
    rstd, rstd * mean(g), -rstd * mean(g * x^).
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
    statistics = factors + FACTOR_BLOCK
    lanes = lanes_of(zero)
    padded = (columns + lanes - 1) // lanes * lanes
    step = GROUP if columns >= _GROUPED_COLUMNS else 1
    while True:
        chunk = take_ticket(tickets)
        if chunk >= call.chunks:
            break
        d_weight = pointer(call.partials, zero) + chunk * 2 * padded
        d_bias = d_weight + padded
        fill(d_weight, 2 * padded, zero)
        first = chunk * call.chunk_rows
        end = min(first + call.chunk_rows, call.rows)
        for index in range(first, end, step):
            group = min(step, end - index)
            x = pointer(call.x, zero) + index * call.x_row
            grad_y = pointer(call.grad_y, zero) + index * call.grad_y_row
            d_total = pointer(call.d_total, zero) + index * columns
            for r in range(group):
                mean = zero
                if centred:
                    mean = pointer(call.mean, zero)[index + r]
                rstd = pointer(call.rstd, zero)[index + r]
                g_mean, gx_mean = _row_means(
                    x + r * call.x_row,
                    grad_y + r * call.grad_y_row,
                    mean,
                    rstd,
                    weight,
                    columns,
                    count,
                    zero,
                )
                if not centred:
                    g_mean = 0.0
                statistics[4 * r] = mean
                statistics[4 * r + 1] = rstd
                statistics[4 * r + 2] = cast(g_mean * rstd, zero)
                statistics[4 * r + 3] = cast(-gx_mean * rstd, zero)
            if group == GROUP:
                _differentiate_group(
                    x,
                    call.x_row,
                    grad_y,
                    call.grad_y_row,
                    statistics,
                    weight,
                    d_total,
                    d_weight,
                    d_bias,
                    columns,
                )
            else:
                for r in range(group):
                    _differentiate_row(
                        x + r * call.x_row,
                        grad_y + r * call.grad_y_row,
                        statistics + 4 * r,
                        weight,
                        d_total + r * columns,
                        d_weight,
                        d_bias,
                        columns,
                    )
            if call.grad_total != 0 or call.d_x != 0:
                for row in range(index, index + group):
                    _finish_row(call, row, factors, zero)
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
