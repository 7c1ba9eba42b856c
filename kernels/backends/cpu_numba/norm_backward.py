"""The backward kernel of layer norm, add-and-norm and RMS norm: columns in the lanes, row by row.

With x^ = (x - mean) * rstd and g = dy * weight, both never stored:

    d_weight = sum over rows of dy * x^          d_bias = sum over rows of dy
    d_total = rstd * (g - mean(g) - x^ * mean(g * x^))  (+ grad_total, in add-and-norm)
    d_x = d_total * keep / (1 - p)               only in add-and-norm with dropout

RMS norm is the same without mean and mean(g). Rows are summed in chunks whose number follows from
the shape alone, and the chunks in their order, so that the bits do not depend on the threads. Half
types are widened in registers; what is summed is float32 or wider.
"""

from __future__ import annotations

from ..cpu_common.call_records import NORM
from ..cpu_common.constants import FACTOR_BLOCK, GROUP, GROUPED_COLUMNS
from .call import Kernel, read
from .gemm import lanes_of
from .jit import jit
from .memory import (
    finish_task,
    integers_at,
    load,
    load_first,
    pointer,
    store,
    store_first,
    take_work,
)
from .norm_forward import draw_factors, fill
from .vector import add_lanes, cast, lanes_before, multiply_add, select, splat

_STATISTICS = 5  # of a row


@jit
def _row_means(x, grad_y, mean, weight, columns, zero):
    """The means of g, of g * (x - mean) and of x - mean over a row."""
    lanes = lanes_of(zero)
    means = splat(mean)
    s0 = s1 = s2 = s3 = splat(zero)
    q0 = q1 = q2 = q3 = splat(zero)
    r0 = r1 = r2 = r3 = splat(zero)
    c = 0
    while c + 4 * lanes <= columns:
        c1, c2, c3 = c + lanes, c + 2 * lanes, c + 3 * lanes
        g0, g1 = load(grad_y + c) * load(weight + c), load(grad_y + c1) * load(weight + c1)
        g2, g3 = load(grad_y + c2) * load(weight + c2), load(grad_y + c3) * load(weight + c3)
        d0, d1 = load(x + c) - means, load(x + c1) - means
        d2, d3 = load(x + c2) - means, load(x + c3) - means
        s0, s1, s2, s3 = s0 + g0, s1 + g1, s2 + g2, s3 + g3
        q0, q1 = multiply_add(g0, d0, q0), multiply_add(g1, d1, q1)
        q2, q3 = multiply_add(g2, d2, q2), multiply_add(g3, d3, q3)
        r0, r1, r2, r3 = r0 + d0, r1 + d1, r2 + d2, r3 + d3
        c += 4 * lanes
    while c < columns:
        rest = columns - c
        g0 = load_first(grad_y + c, rest) * load_first(weight + c, rest)
        d0 = select(lanes_before(rest, zero), load_first(x + c, rest) - means, splat(zero))
        s0, q0, r0 = s0 + g0, multiply_add(g0, d0, q0), r0 + d0
        c += lanes
    first = add_lanes((s0 + s1) + (s2 + s3)) / float(columns)
    second = add_lanes((q0 + q1) + (q2 + q3)) / float(columns)
    third = add_lanes((r0 + r1) + (r2 + r3)) / float(columns)
    return first, second, third


@jit
def _keep_statistics(call, row, statistics, zero):
    """What `_spread` reads, of one row.

    The mean comes rounded, which is too coarse where it is thousands of deviations: the mean of
    x - mean is the rest of it, and x^ = (x - mean) * rstd + shift.
    """
    subtract_mean = call.subtract_mean != 0
    mean = zero
    if subtract_mean:
        mean = pointer(call.mean, zero)[row]
    rstd = pointer(call.rstd, zero)[row]
    x = pointer(call.x, call.item) + row * call.x_row
    grad_y = pointer(call.grad_y, call.item) + row * call.grad_y_row
    weight = pointer(call.weight, zero)
    g_mean, gx_mean, rest = _row_means(x, grad_y, mean, weight, call.columns, zero)
    if not subtract_mean:
        g_mean, rest = 0.0, 0.0
    shift = -rest * rstd
    gx_mean = gx_mean * rstd + shift * g_mean
    statistics[0], statistics[1], statistics[2] = mean, rstd, cast(shift, zero)
    statistics[3], statistics[4] = cast(g_mean * rstd, zero), cast(-gx_mean * rstd, zero)


@jit
def _spread(statistics):
    """A row's statistics, each in all lanes: mean, rstd, shift, rstd * mean(g) and
    -rstd * mean(g * x^)."""
    mean, rstd, shift = splat(statistics[0]), splat(statistics[1]), splat(statistics[2])
    return mean, rstd, shift, splat(statistics[3]), splat(statistics[4])


@jit
def _row_terms(x, d_y, weight, spread):
    """x^ and d_total of one vector."""
    mean, rstd, shift, g_mean, gx_mean = spread
    x_hat = multiply_add(x - mean, rstd, shift)
    return x_hat, multiply_add(x_hat, gx_mean, d_y * weight * rstd - g_mean)


@jit
def _differentiate_row(x, grad_y, statistics, weight, target, sums, columns, zero):
    """target = d_total of one row, whose terms are added to the sums (whole vectors)."""
    d_weight, d_bias = sums
    lanes = lanes_of(zero)
    spread = _spread(statistics)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        d_y = load(grad_y + c)
        x_hat, d_x = _row_terms(load(x + c), d_y, load(weight + c), spread)
        store(target + c, d_x)
        store(d_weight + c, multiply_add(d_y, x_hat, load(d_weight + c)))
        store(d_bias + c, load(d_bias + c) + d_y)
    if rest > 0:
        c = columns - rest
        d_y = load_first(grad_y + c, rest)
        x_hat, d_x = _row_terms(load_first(x + c, rest), d_y, load_first(weight + c, rest), spread)
        store_first(target + c, d_x, rest)
        store(d_weight + c, multiply_add(d_y, x_hat, load(d_weight + c)))
        store(d_bias + c, load(d_bias + c) + d_y)


@jit
def _differentiate_group(of_x, of_grad_y, statistics, weight, to, sums, columns, zero):
    """The same for GROUP rows at once; x, grad_y and the target are (pointer, row stride)."""
    x, x_row = of_x
    grad_y, grad_y_row = of_grad_y
    target, target_row = to
    d_weight, d_bias = sums
    lanes = lanes_of(zero)
    x1, x2, x3 = x + x_row, x + 2 * x_row, x + 3 * x_row
    y1, y2, y3 = grad_y + grad_y_row, grad_y + 2 * grad_y_row, grad_y + 3 * grad_y_row
    t1, t2, t3 = target + target_row, target + 2 * target_row, target + 3 * target_row
    s0, s1 = _spread(statistics), _spread(statistics + _STATISTICS)
    s2, s3 = _spread(statistics + 2 * _STATISTICS), _spread(statistics + 3 * _STATISTICS)
    rest = columns % lanes
    for c in range(0, columns - rest, lanes):
        w = load(weight + c)
        d0, d1, d2, d3 = load(grad_y + c), load(y1 + c), load(y2 + c), load(y3 + c)
        h0, g0 = _row_terms(load(x + c), d0, w, s0)
        h1, g1 = _row_terms(load(x1 + c), d1, w, s1)
        h2, g2 = _row_terms(load(x2 + c), d2, w, s2)
        h3, g3 = _row_terms(load(x3 + c), d3, w, s3)
        store(target + c, g0)
        store(t1 + c, g1)
        store(t2 + c, g2)
        store(t3 + c, g3)
        products = multiply_add(d0, h0, d1 * h1) + multiply_add(d2, h2, d3 * h3)
        store(d_weight + c, load(d_weight + c) + products)
        store(d_bias + c, load(d_bias + c) + ((d0 + d1) + (d2 + d3)))
    if rest > 0:
        c = columns - rest
        last = d_weight + c, d_bias + c
        for r in range(GROUP):
            row, of_y = x + (r * x_row + c), grad_y + (r * grad_y_row + c)
            result, of_row = target + (r * target_row + c), statistics + _STATISTICS * r
            _differentiate_row(row, of_y, of_row, weight + c, result, last, rest, zero)


@jit
def _differentiate_rows(call, index, group, first, columns, statistics, to, sums, zero):
    """`columns` of d_total from `first` on, for `group` rows from `index` on."""
    d_weight, d_bias = sums
    part = d_weight + first, d_bias + first
    x = pointer(call.x, call.item) + (index * call.x_row + first)
    grad_y = pointer(call.grad_y, call.item) + (index * call.grad_y_row + first)
    weight = pointer(call.weight, zero) + first
    if group == GROUP:
        of_x, of_grad_y = (x, call.x_row), (grad_y, call.grad_y_row)
        _differentiate_group(of_x, of_grad_y, statistics, weight, to, part, columns, zero)
    else:
        target, target_row = to
        for r in range(group):
            row, of_y = x + r * call.x_row, grad_y + r * call.grad_y_row
            result, of_row = target + r * target_row, statistics + _STATISTICS * r
            _differentiate_row(row, of_y, of_row, weight, result, part, columns, zero)


@jit
def _finish_block(call, row, first, columns, block, factors, zero):
    """d_total = block (+ grad_total) and d_x = d_total * keep, for at most FACTOR_BLOCK columns."""
    lanes = lanes_of(zero)
    d_total = pointer(call.d_total, call.item) + (row * call.columns + first)
    grad_total = pointer(call.grad_total, call.item) + (row * call.grad_total_row + first)
    d_x = pointer(call.d_x, call.item) + (row * call.columns + first)
    if call.grad_total != 0:
        for c in range(0, columns, lanes):
            store(block + c, load(block + c) + load_first(grad_total + c, columns - c))
    for c in range(0, columns, lanes):
        store_first(d_total + c, load(block + c), columns - c)
    if call.d_x != 0:
        keep_scale = cast(call.keep_scale, zero)
        draw_factors(factors, row, first, columns, call.threshold, keep_scale, call.seed, zero)
        for c in range(0, columns, lanes):
            store_first(d_x + c, load(block + c) * load(factors + c), columns - c)


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


def backward(argument):
    """All rows, and the sums of d_weight and d_bias.

    Scratch: FACTOR_BLOCK elements, and for each of GROUP rows as many and five more, its
    statistics.
    """
    call = read(argument)
    zero = call.zero
    counters = integers_at(call.work_counter)
    thread = take_work(counters + 1)
    columns = call.columns
    factors = pointer(call.scratch + thread * call.scratch_bytes, zero)
    blocks = factors + FACTOR_BLOCK
    statistics = blocks + GROUP * FACTOR_BLOCK
    lanes = lanes_of(zero)
    padded = (columns + lanes - 1) // lanes * lanes
    step = GROUP if columns >= GROUPED_COLUMNS else 1
    while True:
        chunk = take_work(counters)
        if chunk >= call.chunks:
            break
        d_weight = pointer(call.partials, zero) + chunk * 2 * padded
        sums = d_weight, d_weight + padded
        fill(d_weight, 2 * padded, zero)
        start = chunk * call.chunk_rows
        end = min(start + call.chunk_rows, call.rows)
        for index in range(start, end, step):
            group = min(step, end - index)
            for r in range(group):
                _keep_statistics(call, index + r, statistics + _STATISTICS * r, zero)
            if call.grad_total == 0 and call.d_x == 0:
                d_total = pointer(call.d_total, call.item) + index * columns
                to = d_total, columns
                _differentiate_rows(call, index, group, 0, columns, statistics, to, sums, zero)
            else:
                for c in range(0, columns, FACTOR_BLOCK):
                    width = min(FACTOR_BLOCK, columns - c)
                    to_block = blocks, FACTOR_BLOCK
                    _differentiate_rows(
                        call, index, group, c, width, statistics, to_block, sums, zero
                    )
                    for r in range(group):
                        block = blocks + r * FACTOR_BLOCK
                        _finish_block(call, index + r, c, width, block, factors, zero)
        if finish_task(counters + 2) == call.chunks - 1:
            partials = pointer(call.partials, zero)
            if call.d_weight != 0:
                target = pointer(call.d_weight, zero)
                _sum_chunks(partials, 2 * padded, call.chunks, target, columns, zero)
            if call.d_bias != 0:
                target = pointer(call.d_bias, zero)
                _sum_chunks(partials + padded, 2 * padded, call.chunks, target, columns, zero)


BACKWARD = Kernel(backward, NORM.fields("backward"))


def scratch_elements() -> int:
    """Elements of scratch that a thread of `BACKWARD` needs."""
    return FACTOR_BLOCK + GROUP * (FACTOR_BLOCK + _STATISTICS)
