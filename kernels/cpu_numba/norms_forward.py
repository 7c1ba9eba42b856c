"""The forward kernel of layer norm, add-and-norm and RMS norm: columns in the lanes, row by row.

A row is read from memory once and from the cache afterwards:

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

import math

from .call import Kernel, read
from .elementwise import at_least, philox_columns
from .jit import jit
from .microkernel import lanes_of
from .simd import (
    add_lanes,
    cast,
    integers_at,
    lanes_before,
    load,
    load_first,
    multiply_add,
    pointer,
    select,
    splat,
    store,
    store_first,
    take_ticket,
)

NORM_STREAM = 0x6E6F726D
# Columns whose dropout is drawn at a time: small enough to stay in the first cache.
FACTOR_BLOCK = 256
_WORD = 0xFFFFFFFF


@jit
def fill(target, columns, value):
    """`columns` elements, rounded up to whole vectors, set to `value`."""
    for c in range(0, columns, lanes_of(value)):
        store(target + c, splat(value))


@jit
def draw_factors(factors, row, first, columns, threshold, keep_scale, seed, zero):
    """What dropout multiplies `columns` elements of a row by, `keep_scale` or 0.

    `first`, the first column, is a multiple of 4; `columns` is rounded up to four whole vectors.
    """
    lanes = lanes_of(zero)
    kept, dropped = splat(keep_scale), splat(zero)
    for c in range(0, columns, 4 * lanes):
        group = (first + c) // 4
        w0, w1, w2, w3 = philox_columns(group, row & _WORD, row >> 32, NORM_STREAM, seed, zero)
        store(factors + c, select(at_least(w0, threshold), kept, dropped))
        store(factors + (c + lanes), select(at_least(w1, threshold), kept, dropped))
        store(factors + (c + 2 * lanes), select(at_least(w2, threshold), kept, dropped))
        store(factors + (c + 3 * lanes), select(at_least(w3, threshold), kept, dropped))


@jit
def _add_row(x, factors, residual, total, columns, zero):
    """total = residual + x * factors, for at most FACTOR_BLOCK columns."""
    lanes = lanes_of(zero)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        store(total + c, load(residual + c) + load(x + c) * load(factors + c))
    if rest > 0:
        c = columns - rest
        dropped = load_first(x + c, rest) * load(factors + c)
        store_first(total + c, load_first(residual + c, rest) + dropped, rest)


@jit
def _row_mean(row, columns, count, zero):
    lanes = lanes_of(zero)
    s0 = s1 = s2 = s3 = splat(zero)
    c = 0
    while c + 4 * lanes <= columns:
        s0 = s0 + load(row + c)
        s1 = s1 + load(row + (c + lanes))
        s2 = s2 + load(row + (c + 2 * lanes))
        s3 = s3 + load(row + (c + 3 * lanes))
        c += 4 * lanes
    while c < columns:
        s0 = s0 + load_first(row + c, columns - c)
        c += lanes
    return cast(add_lanes((s0 + s1) + (s2 + s3)) / count, zero)


@jit
def _row_moments(row, mean, columns, count, zero):
    """The means of row - mean and of its square."""
    lanes = lanes_of(zero)
    means = splat(mean)
    s0 = s1 = s2 = s3 = splat(zero)
    q0 = q1 = q2 = q3 = splat(zero)
    c = 0
    while c + 4 * lanes <= columns:
        d0 = load(row + c) - means
        d1 = load(row + (c + lanes)) - means
        d2 = load(row + (c + 2 * lanes)) - means
        d3 = load(row + (c + 3 * lanes)) - means
        s0, s1, s2, s3 = s0 + d0, s1 + d1, s2 + d2, s3 + d3
        q0, q1 = multiply_add(d0, d0, q0), multiply_add(d1, d1, q1)
        q2, q3 = multiply_add(d2, d2, q2), multiply_add(d3, d3, q3)
        c += 4 * lanes
    while c < columns:
        rest = columns - c
        d0 = load_first(row + c, rest) - means
        d0 = select(lanes_before(rest, zero), d0, splat(zero))
        s0 = s0 + d0
        q0 = multiply_add(d0, d0, q0)
        c += lanes
    first = add_lanes((s0 + s1) + (s2 + s3)) / count
    second = add_lanes((q0 + q1) + (q2 + q3)) / count
    return first, second


@jit
def _write_row(row, mean, shift, rstd, weight, bias, y, columns, zero):
    """y = ((row - mean) - shift) * rstd * weight + bias."""
    lanes = lanes_of(zero)
    means, shifts, scales = splat(mean), splat(-shift * rstd), splat(rstd)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        normal = multiply_add(load(row + c) - means, scales, shifts)
        store(y + c, multiply_add(normal, load(weight + c), load(bias + c)))
    if rest > 0:
        c = columns - rest
        normal = multiply_add(load_first(row + c, rest) - means, scales, shifts)
        result = multiply_add(normal, load_first(weight + c, rest), load_first(bias + c, rest))
        store_first(y + c, result, rest)


def normalise(argument):
    """x, residual, y, total (rows, columns); weight, bias (columns,); mean, rstd (rows,).

    x and residual have a row stride of their own, in elements; all else is contiguous. Without a
    residual (0) x itself is normalised; without `centred` the mean is taken as 0 and not stored.
    Scratch: FACTOR_BLOCK elements.
    """
    call = read(argument)
    zero = call.zero
    tickets = integers_at(call.tickets)
    thread = take_ticket(tickets + 1)
    columns = call.columns
    count = float(columns)
    adding, dropping, centred = call.residual != 0, call.dropping != 0, call.centred != 0
    weight, bias = pointer(call.weight, zero), pointer(call.bias, zero)
    factors = pointer(call.scratch + thread * call.scratch_bytes, zero)
    keep_scale = cast(call.keep_scale, zero)
    fill(factors, FACTOR_BLOCK, cast(1.0, zero))
    while True:
        first = take_ticket(tickets) * call.task_rows
        if first >= call.rows:
            break
        for index in range(first, min(first + call.task_rows, call.rows)):
            row = pointer(call.x, zero) + index * call.x_row
            if adding:
                total = pointer(call.total, zero) + index * columns
                residual = pointer(call.residual, zero) + index * call.residual_row
                for c in range(0, columns, FACTOR_BLOCK):
                    width = min(FACTOR_BLOCK, columns - c)
                    if dropping:
                        draw_factors(
                            factors, index, c, width, call.threshold, keep_scale, call.seed, zero
                        )
                    _add_row(row + c, factors, residual + c, total + c, width, zero)
                row = total
            mean = zero
            if centred:
                mean = _row_mean(row, columns, count, zero)
            shift, square = _row_moments(row, mean, columns, count, zero)
            if centred:
                pointer(call.mean, zero)[index] = cast(mean + shift, zero)
            else:
                shift = 0.0
            variance = square - shift * shift
            if variance < 0.0:
                variance = 0.0
            rstd = cast(1.0 / math.sqrt(variance + call.eps), zero)
            pointer(call.rstd, zero)[index] = rstd
            y = pointer(call.y, zero) + index * columns
            _write_row(row, mean, cast(shift, zero), rstd, weight, bias, y, columns, zero)


FORWARD = Kernel(
    normalise,
    (
        *("x", "x_row", "residual", "residual_row", "weight", "bias"),
        *("y", "total", "mean", "rstd"),
        *("rows", "columns", "task_rows", "centred"),
        *("dropping", "threshold", "seed"),
    ),
    ("eps", "keep_scale"),
)
