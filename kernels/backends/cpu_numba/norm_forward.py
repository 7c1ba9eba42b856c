"""The forward kernel of layer norm, add-and-norm and RMS norm: columns in the lanes, row by row.

A row is read from memory once and from the cache afterwards:

    total = residual + x * keep / (1 - p)                       only in add-and-norm
    near = the mean of the row's first elements
    shift, square = sum(row - near) / N, sum((row - near)^2) / N
    rstd = 1 / sqrt(square - shift^2 + eps)
    y = ((row - near) - shift) * rstd * weight + bias

Where `near` is not near the mean (shift^2 not small beside square), it becomes near + shift and the
two sums are taken again: so the statistics hold where the mean is thousands of deviations, as in
the 'corrected two-pass algorithm' (Chan, Golub & LeVeque 1983). RMS norm is the same with near =
shift = 0. Half types are widened in registers; `total` is rounded to them before it is normalised.

A sum ends in a chain of dependent instructions in which memory would stand still. Short rows are
therefore written while a later one is summed, and long rows taken GROUP at a time.
"""

from __future__ import annotations

import math

from ..cpu_common.call_records import NORM
from ..cpu_common.constants import (
    FACTOR_BLOCK,
    FAR,
    GROUP,
    GROUPED_COLUMNS,
    NEAR_VECTORS,
    NORM_STREAM,
)
from .call import Kernel, read
from .gemm import lanes_of
from .jit import jit
from .memory import integers_at, load, load_first, pointer, store, store_first, take_work
from .philox import at_least, philox_columns
from .vector import add_lanes, cast, lanes_before, multiply_add, select, splat

_WORD = 0xFFFFFFFF
_MOMENT_BYTES = 2 * GROUP * 8


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
def _add_block(x, factors, residual, total, columns, zero):
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
def _add_row(call, index, factors, zero):
    """One row of total = residual + x * keep / (1 - p)."""
    columns = call.columns
    x = pointer(call.x, call.item) + index * call.x_row
    residual = pointer(call.residual, call.item) + index * call.residual_row
    total = pointer(call.total, call.item) + index * columns
    keep_scale = cast(call.keep_scale, zero)
    for c in range(0, columns, FACTOR_BLOCK):
        width = min(FACTOR_BLOCK, columns - c)
        if call.dropout != 0:
            draw_factors(factors, index, c, width, call.threshold, keep_scale, call.seed, zero)
        _add_block(x + c, factors, residual + c, total + c, width, zero)


@jit
def _row_mean(row, columns, zero):
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
    return cast(add_lanes((s0 + s1) + (s2 + s3)) / float(columns), zero)


@jit
def _row_moments(row, near, columns, zero):
    """The means of row - near and of its square."""
    lanes = lanes_of(zero)
    nears = splat(near)
    s0 = s1 = s2 = s3 = splat(zero)
    q0 = q1 = q2 = q3 = splat(zero)
    c = 0
    while c + 4 * lanes <= columns:
        d0 = load(row + c) - nears
        d1 = load(row + (c + lanes)) - nears
        d2 = load(row + (c + 2 * lanes)) - nears
        d3 = load(row + (c + 3 * lanes)) - nears
        s0, s1, s2, s3 = s0 + d0, s1 + d1, s2 + d2, s3 + d3
        q0, q1 = multiply_add(d0, d0, q0), multiply_add(d1, d1, q1)
        q2, q3 = multiply_add(d2, d2, q2), multiply_add(d3, d3, q3)
        c += 4 * lanes
    while c < columns:
        rest = columns - c
        d0 = load_first(row + c, rest) - nears
        d0 = select(lanes_before(rest, zero), d0, splat(zero))
        s0 = s0 + d0
        q0 = multiply_add(d0, d0, q0)
        c += lanes
    first = add_lanes((s0 + s1) + (s2 + s3)) / float(columns)
    second = add_lanes((q0 + q1) + (q2 + q3)) / float(columns)
    return first, second


@jit
def _prepare_row(call, index, factors, zero):
    """The row that is normalised, written first where it is a sum; returns its `near`."""
    row = pointer(call.x, call.item) + index * call.x_row
    if call.residual != 0:
        _add_row(call, index, factors, zero)
        row = pointer(call.total, call.item) + index * call.columns
    near = zero
    if call.subtract_mean != 0:
        near = _row_mean(row, min(call.columns, NEAR_VECTORS * lanes_of(zero)), zero)
    return row, near


@jit
def _keep_statistics(call, index, row, near, first, square, statistics, zero):
    """mean and rstd from the moments; statistics = near, -shift * rstd, rstd."""
    shift = 0.0
    if call.subtract_mean != 0:
        if FAR * first * first > square:
            near = cast(near + first, zero)
            first, square = _row_moments(row, near, call.columns, zero)
        shift = first
        pointer(call.mean, zero)[index] = cast(near + shift, zero)
    variance = square - shift * shift
    if variance < 0.0:
        variance = 0.0
    rstd = cast(1.0 / math.sqrt(variance + call.eps), zero)
    pointer(call.rstd, zero)[index] = rstd
    statistics[0], statistics[1], statistics[2] = near, cast(-shift * rstd, zero), rstd


@jit
def _spread(statistics):
    """A row's statistics, each in all lanes."""
    return splat(statistics[0]), splat(statistics[1]), splat(statistics[2])


@jit
def _affine(x, spread, weight, bias):
    """((x - near) - shift) * rstd * weight + bias of one vector."""
    near, shift, rstd = spread
    return multiply_add(multiply_add(x - near, rstd, shift), weight, bias)


@jit
def _write_row(row, statistics, weight, bias, y, columns, zero):
    lanes = lanes_of(zero)
    spread = _spread(statistics)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        store(y + c, _affine(load(row + c), spread, load(weight + c), load(bias + c)))
    if rest > 0:
        c = columns - rest
        w, b = load_first(weight + c, rest), load_first(bias + c, rest)
        store_first(y + c, _affine(load_first(row + c, rest), spread, w, b), rest)


@jit
def _write_group(row, row_stride, statistics, weight, bias, y, columns, zero):
    """The same for GROUP rows at once."""
    lanes = lanes_of(zero)
    r1, r2, r3 = row + row_stride, row + 2 * row_stride, row + 3 * row_stride
    y1, y2, y3 = y + columns, y + 2 * columns, y + 3 * columns
    s0, s1 = _spread(statistics), _spread(statistics + 4)
    s2, s3 = _spread(statistics + 8), _spread(statistics + 12)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        w, b = load(weight + c), load(bias + c)
        store(y + c, _affine(load(row + c), s0, w, b))
        store(y1 + c, _affine(load(r1 + c), s1, w, b))
        store(y2 + c, _affine(load(r2 + c), s2, w, b))
        store(y3 + c, _affine(load(r3 + c), s3, w, b))
    if rest > 0:
        c = columns - rest
        for r in range(GROUP):
            x, to, of_row = row + (r * row_stride + c), y + (r * columns + c), statistics + 4 * r
            _write_row(x, of_row, weight + c, bias + c, to, rest, zero)


@jit
def _write_and_sum(row, statistics, weight, bias, y, following, near, columns, zero):
    """`_write_row` of one row and `_row_moments` of the following one, with their bits."""
    lanes = lanes_of(zero)
    spread = _spread(statistics)
    nears = splat(near)
    s0 = s1 = s2 = s3 = splat(zero)
    q0 = q1 = q2 = q3 = splat(zero)
    c = 0
    while c + 4 * lanes <= columns:
        c1, c2, c3 = c + lanes, c + 2 * lanes, c + 3 * lanes
        d0, d1 = load(following + c) - nears, load(following + c1) - nears
        d2, d3 = load(following + c2) - nears, load(following + c3) - nears
        s0, s1, s2, s3 = s0 + d0, s1 + d1, s2 + d2, s3 + d3
        q0, q1 = multiply_add(d0, d0, q0), multiply_add(d1, d1, q1)
        q2, q3 = multiply_add(d2, d2, q2), multiply_add(d3, d3, q3)
        store(y + c, _affine(load(row + c), spread, load(weight + c), load(bias + c)))
        store(y + c1, _affine(load(row + c1), spread, load(weight + c1), load(bias + c1)))
        store(y + c2, _affine(load(row + c2), spread, load(weight + c2), load(bias + c2)))
        store(y + c3, _affine(load(row + c3), spread, load(weight + c3), load(bias + c3)))
        c += 4 * lanes
    while c < columns:
        rest = columns - c
        d0 = select(lanes_before(rest, zero), load_first(following + c, rest) - nears, splat(zero))
        s0, q0 = s0 + d0, multiply_add(d0, d0, q0)
        w, b = load_first(weight + c, rest), load_first(bias + c, rest)
        store_first(y + c, _affine(load_first(row + c, rest), spread, w, b), rest)
        c += lanes
    first = add_lanes((s0 + s1) + (s2 + s3)) / float(columns)
    second = add_lanes((q0 + q1) + (q2 + q3)) / float(columns)
    return first, second


@jit
def _normalise_one_by_one(call, start, end, factors, statistics, moments, zero):
    """Rows start to end, as a pipeline: in one step a row is prepared, another one's moments are
    summed while a third is written, and the statistics of a fourth follow from its moments.

    Each of these ends in a chain of dependent instructions, and a step is what hides it: what a
    step computes is first used a step later, or two.
    """
    columns = call.columns
    weight, bias = pointer(call.weight, zero), pointer(call.bias, zero)
    rows, row_stride = pointer(call.x, call.item), call.x_row
    if call.residual != 0:
        rows, row_stride = pointer(call.total, call.item), columns
    nears = statistics + 4 * GROUP
    for index in range(start - 4, end):  # the row that is written
        prepared, summed, known = index + 4, index + 3, index + 1
        if prepared < end:
            _, near = _prepare_row(call, prepared, factors, zero)
            nears[prepared & 3] = near
        row = rows + index * row_stride
        if start <= known < end:
            slot = known & 3
            first, square = moments[2 * slot], moments[2 * slot + 1]
            near = nears[slot]
            _keep_statistics(
                call, known, row + row_stride, near, first, square, statistics + 4 * slot, zero
            )
        y = pointer(call.y, call.item) + index * columns
        of_row = statistics + 4 * (index & 3)
        if not start <= summed < end:
            if index >= start:
                _write_row(row, of_row, weight, bias, y, columns, zero)
            continue
        near = nears[summed & 3]
        ahead = row + 3 * row_stride
        if index < start:
            first, square = _row_moments(ahead, near, columns, zero)
        else:
            first, square = _write_and_sum(row, of_row, weight, bias, y, ahead, near, columns, zero)
        moments[2 * (summed & 3)], moments[2 * (summed & 3) + 1] = first, square


@jit
def _normalise_groups(call, start, end, factors, statistics, zero):
    """Rows start to end, GROUP at a time."""
    columns = call.columns
    weight, bias = pointer(call.weight, zero), pointer(call.bias, zero)
    rows, row_stride = pointer(call.x, call.item), call.x_row
    if call.residual != 0:
        rows, row_stride = pointer(call.total, call.item), columns
    for index in range(start, end, GROUP):
        group = min(GROUP, end - index)
        for r in range(group):
            row, near = _prepare_row(call, index + r, factors, zero)
            first, square = _row_moments(row, near, columns, zero)
            _keep_statistics(call, index + r, row, near, first, square, statistics + 4 * r, zero)
        row = rows + index * row_stride
        y = pointer(call.y, call.item) + index * columns
        if group == GROUP:
            _write_group(row, row_stride, statistics, weight, bias, y, columns, zero)
        else:
            for r in range(group):
                x, to, of_row = row + r * row_stride, y + r * columns, statistics + 4 * r
                _write_row(x, of_row, weight, bias, to, columns, zero)


def forward(argument):
    """All rows.

    Scratch, for four rows: two float64 moments each; behind them FACTOR_BLOCK elements, then four
    statistics each, then `near` of each.
    """
    call = read(argument)
    zero = call.zero
    counters = integers_at(call.work_counter)
    thread = take_work(counters + 1)
    scratch = call.scratch + thread * call.scratch_bytes
    moments = pointer(scratch, 0.0)
    factors = pointer(scratch + _MOMENT_BYTES, zero)
    statistics = factors + FACTOR_BLOCK
    fill(factors, FACTOR_BLOCK, cast(1.0, zero))
    while True:
        start = take_work(counters) * call.task_rows
        if start >= call.rows:
            break
        end = min(start + call.task_rows, call.rows)
        if call.columns >= GROUPED_COLUMNS:
            _normalise_groups(call, start, end, factors, statistics, zero)
        else:
            _normalise_one_by_one(call, start, end, factors, statistics, moments, zero)


FORWARD = Kernel(forward, NORM.fields("forward"))


def scratch_bytes(itemsize: int) -> int:
    """Bytes of scratch that a thread of `FORWARD` needs, where elements have `itemsize` bytes."""
    return _MOMENT_BYTES + (FACTOR_BLOCK + 5 * GROUP) * itemsize
