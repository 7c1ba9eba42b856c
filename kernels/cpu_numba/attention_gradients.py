"""Attention backward: one pass over a head, query tiles outside, key blocks inside.

Every product is done once, and each sum has one order, whatever the number of threads. With
P recomputed from lse, M = dropout's keep mask / (1 - p) and delta = sum_k(dO * O) - dlse:

    S^T = K Q^T        P^T = 2^(S^T - lse * log2 e)       (Q^T scaled by scale * log2 e)
    dP^T = V dO^T      dS^T = P^T * (M^T * dP^T - delta)  d_bias += dS
    dV += (P * M)^T dO     dK += scale * dS^T Q           columns of the head in the lanes
    dQ^T += scale * K^T dS^T                              queries in the lanes

(Dao et al. 2022, algorithm 4.) lse * log2 e comes as a rounded value and the rest of it. A task is
one head of K and V with all query heads that share it.
"""

from __future__ import annotations

import math

from .attention_tiles import (
    BLOCK_KEYS,
    INTEGERS,
    LOG2_E,
    REALS,
    add_bias,
    attends_none,
    in_range,
    key_ranges,
    random_words,
    tile_vectors,
)
from .call import Kernel, read
from .elementwise import at_least, exp2
from .jit import jit
from .microkernel import VECTORS, lanes_of, multiply, transpose
from .simd import (
    add_lanes,
    as_integers32,
    cast,
    integers_at,
    item_size,
    load,
    load_first,
    load_integers,
    multiply_add,
    pointer,
    select,
    splat,
    store,
    store_first,
    take_ticket,
)

_GRADIENTS = (
    *("grad_out", "grad_out_batch", "grad_out_head", "grad_out_row"),  # (B, Hq, Lq, Dv)
    "grad_lse",  # (B, Hq, Lq) float64, contiguous, or absent
    *("d_query", "d_query_batch", "d_query_head", "d_query_row"),  # as query
    *("d_key", "d_key_batch", "d_key_head", "d_key_row"),
    *("d_value", "d_value_batch", "d_value_head", "d_value_row"),
    *("d_bias", "d_bias_batch", "d_bias_head", "d_bias_row", "d_bias_column"),  # zeros, as bias
    "d_bias_wide",  # 1 where d_bias is float64: a bias that is broadcast, whose gradient is a sum
    *("batch_tasks", "head_tasks"),  # 1 where one task takes all batch elements, or all heads
)


@jit
def _fill(target, elements, value):
    """The first `elements` (a multiple of the lanes) of `target` set to `value`."""
    for at in range(0, elements, lanes_of(target)):
        store(target + at, splat(value))


@jit
def _copy_rows(source, source_row, target, target_row, rows, columns, lse, zero):
    """Rows of `source`, padded with zeros to `target_row` columns; only zeros where lse is -inf."""
    lanes = lanes_of(zero)
    for r in range(rows):
        if lse[r] == -math.inf:
            _fill(target + r * target_row, target_row, zero)
        else:
            for c in range(0, target_row, lanes):
                vector = load_first(source + (r * source_row + c), columns - c)
                store(target + (r * target_row + c), vector)


@jit
def _write_rows(source, source_row, target, target_row, rows, columns, factor):
    """target = factor * source, without the padding."""
    lanes = lanes_of(source)
    factors = splat(factor)
    for r in range(rows):
        for c in range(0, columns, lanes):
            vector = load(source + (r * source_row + c)) * factors
            store_first(target + (r * target_row + c), vector, columns - c)


@jit
def _dot_rows(a, a_row, b, b_row, r, columns, zero):
    """sum_c a[r, c] * b[r, c]."""
    lanes = lanes_of(zero)
    total = splat(zero)
    for c in range(0, columns, lanes):
        total = multiply_add(
            load_first(a + (r * a_row + c), columns - c),
            load_first(b + (r * b_row + c), columns - c),
            total,
        )
    return add_lanes(total)


@jit
def _gradient_of_weight(scores, d_weights, row, lse2, rest, delta, allowed, masked, zeros):
    """One vector of P and of dS, in the place of S and dP."""
    weight = exp2(load(scores + row) - lse2 - rest)
    if masked:
        weight = select(allowed, weight, zeros)
    store(scores + row, weight)
    store(d_weights + row, weight * (load(d_weights + row) - delta))


@jit
def _gradient_of_dropped(
    scores, d_weights, row, lse2, rest, delta, allowed, words, threshold, keep_scale, zeros
):
    """The same with dropout: P * M in the place of S."""
    weight = select(allowed, exp2(load(scores + row) - lse2 - rest), zeros)
    keep = select(at_least(words, threshold), keep_scale, zeros)
    store(scores + row, weight * keep)
    store(d_weights + row, weight * (load(d_weights + row) * keep - delta))


@jit
def _gradient_block(
    call, b, h, start, masked, k0, keys, width, scores, d_weights, lse2, rest, delta, first, last
):
    """P (or P * M) in the place of the block's scores, and dS in the place of its dP."""
    zero = call.zero
    lanes = lanes_of(zero)
    zeros = splat(zero)
    for v in range(0, width, lanes):
        row_lse, row_rest, row_delta = load(lse2 + v), load(rest + v), load(delta + v)
        low = load_integers(as_integers32(first) + v, zero)
        high = load_integers(as_integers32(last) + v, zero)
        if call.dropout == 0:
            for k in range(keys):
                allowed = in_range(k0 + k, low, high, zero)
                _gradient_of_weight(
                    scores,
                    d_weights,
                    k * width + v,
                    row_lse,
                    row_rest,
                    row_delta,
                    allowed,
                    masked,
                    zeros,
                )
            continue
        keep_scale = splat(cast(call.keep_scale, zero))
        for group in range(k0 // 4, (k0 + keys + 3) // 4):
            w0, w1, w2, w3 = random_words(call, b, h, start, v, group)
            for word in range(4):
                k = 4 * group + word - k0
                if 0 <= k < keys:
                    words = w0
                    if word == 1:
                        words = w1
                    elif word == 2:
                        words = w2
                    elif word == 3:
                        words = w3
                    allowed = in_range(k0 + k, low, high, zero)
                    _gradient_of_dropped(
                        scores,
                        d_weights,
                        k * width + v,
                        row_lse,
                        row_rest,
                        row_delta,
                        allowed,
                        words,
                        call.threshold,
                        keep_scale,
                        zeros,
                    )


@jit
def _add_bias_gradient(target, row_stride, column_stride, rows, width, keys, d_scores):
    """target[i, j] += dS^T[j, i], summed in float64 over a dimension whose stride is 0."""
    if row_stride == 0:
        for k in range(keys):
            total = 0.0
            for r in range(rows):
                total += d_scores[k * width + r]
            target[k * column_stride] += total
    elif column_stride == 0:
        for r in range(rows):
            total = 0.0
            for k in range(keys):
                total += d_scores[k * width + r]
            target[r * row_stride] += total
    else:
        for r in range(rows):
            for k in range(keys):
                target[r * row_stride + k] += d_scores[k * width + r]


@jit
def _multiply_wide(columns, rows, depth, a, a_row, b, b_row, c):
    """C += A B with C and A (rows, .) scratch and `columns` of B in panels of VECTORS."""
    lanes = lanes_of(a)
    for at in range(0, columns, VECTORS * lanes):
        vectors = min(VECTORS, (columns - at) // lanes)
        multiply(vectors, rows, depth, (a, a_row, 1), (b + at, b_row), (c + at, columns), True)


@jit
def _backward_tile(call, b, h, start, scratch, d_key, d_value):
    """One tile of queries: writes its d_query, adds to the head's d_key and d_value in scratch."""
    zero = call.zero
    lanes = lanes_of(zero)
    rows = min(VECTORS * lanes, call.query_len - start)
    vectors = tile_vectors(rows, zero)
    width = vectors * lanes
    head_columns = (call.head_dim + lanes - 1) // lanes * lanes
    value_columns = (call.value_dim + lanes - 1) // lanes * lanes

    query_t = scratch
    d_query_t = query_t + call.head_dim * width
    grad_out_t = d_query_t + call.head_dim * width
    scores = grad_out_t + call.value_dim * width
    d_weights = scores + BLOCK_KEYS * width
    bias = d_weights + BLOCK_KEYS * width
    query_rows = bias + BLOCK_KEYS * width
    grad_out_rows = query_rows + head_columns * width
    lse2 = grad_out_rows + value_columns * width
    rest = lse2 + width
    delta = rest + width
    first = delta + width
    last = first + width

    head = h // (call.heads // call.key_heads)
    row = (b * call.heads + h) * call.query_len + start
    lse = pointer(call.lse, 0.0) + row
    query_row, grad_out_row = call.query_row, call.grad_out_row
    query = pointer(call.query, zero) + (
        b * call.query_batch + h * call.query_head + start * query_row
    )
    grad_out = pointer(call.grad_out, zero) + (
        b * call.grad_out_batch + h * call.grad_out_head + start * grad_out_row
    )
    out = pointer(call.out, zero) + (b * call.out_batch + h * call.out_head + start * call.out_row)
    key = pointer(call.key, zero) + (b * call.key_batch + head * call.key_head)
    value = pointer(call.value, zero) + (b * call.value_batch + head * call.value_head)
    d_query = pointer(call.d_query, zero) + (
        b * call.d_query_batch + h * call.d_query_head + start * call.d_query_row
    )

    begin, end, common_first, common_last = key_ranges(call, b, start, rows, width, first, last)
    _fill(d_query_t, call.head_dim * width, zero)
    if begin < end:
        # Rows that attend nothing may hold NaN, and padding is needed where a row is no whole
        # number of vectors: only then are the rows copied.
        dead = False
        for r in range(rows):
            dead = dead or lse[r] == -math.inf
        if dead or head_columns != call.head_dim:
            _copy_rows(query, query_row, query_rows, head_columns, rows, call.head_dim, lse, zero)
            query, query_row = query_rows, head_columns
        if dead or value_columns != call.value_dim:
            _copy_rows(
                grad_out,
                grad_out_row,
                grad_out_rows,
                value_columns,
                rows,
                call.value_dim,
                lse,
                zero,
            )
            grad_out, grad_out_row = grad_out_rows, value_columns
        if rows < width:
            _fill(query_t, call.head_dim * width, zero)
            _fill(grad_out_t, call.value_dim * width, zero)
            _fill(lse2, width, zero)
            _fill(rest, width, zero)
            _fill(delta, width, zero)
        scale = cast(call.scale, zero)
        transpose(query, query_row, query_t, width, rows, call.head_dim, scale)
        transpose(grad_out, grad_out_row, grad_out_t, width, rows, call.value_dim, cast(1.0, zero))
        for r in range(rows):
            # +inf makes every weight of a row that attends nothing 2^-inf = 0
            both = math.inf if lse[r] == -math.inf else lse[r] * LOG2_E
            lse2[r] = cast(both, zero)
            rest[r] = cast(0.0 if both == math.inf else both - lse2[r], zero)
            delta[r] = _dot_rows(grad_out, grad_out_row, out, call.out_row, r, call.value_dim, zero)
            if call.grad_lse != 0 and lse[r] != -math.inf:
                delta[r] -= cast((pointer(call.grad_lse, 0.0) + row)[r], zero)

    for k0 in range(begin, end, BLOCK_KEYS):
        keys = min(BLOCK_KEYS, end - k0)
        if attends_none(call, b, h, start, rows, k0, keys):
            continue
        key_block, value_block = key + k0 * call.key_row, value + k0 * call.value_row
        multiply(
            vectors,
            keys,
            call.head_dim,
            (key_block, call.key_row, 1),
            (query_t, width),
            (scores, width),
            False,
        )
        multiply(
            vectors,
            keys,
            call.value_dim,
            (value_block, call.value_row, 1),
            (grad_out_t, width),
            (d_weights, width),
            False,
        )
        if call.bias != 0 or call.dense != 0:
            add_bias(call, b, h, start, rows, width, k0, keys, scores, bias)
        masked = k0 < common_first or k0 + keys - 1 > common_last
        _gradient_block(
            call,
            b,
            h,
            start,
            masked,
            k0,
            keys,
            width,
            scores,
            d_weights,
            lse2,
            rest,
            delta,
            first,
            last,
        )
        if call.d_bias != 0:
            offset = b * call.d_bias_batch + h * call.d_bias_head
            offset += start * call.d_bias_row + k0 * call.d_bias_column
            if call.d_bias_wide != 0:
                target = pointer(call.d_bias, 0.0) + offset
                _add_bias_gradient(
                    target, call.d_bias_row, call.d_bias_column, rows, width, keys, d_weights
                )
            else:
                whole = pointer(call.d_bias, zero) + offset
                _add_bias_gradient(
                    whole, call.d_bias_row, call.d_bias_column, rows, width, keys, d_weights
                )
        to = d_value + k0 * value_columns
        _multiply_wide(value_columns, keys, rows, scores, width, grad_out, grad_out_row, to)
        to = d_key + k0 * head_columns
        _multiply_wide(head_columns, keys, rows, d_weights, width, query, query_row, to)
        multiply(
            vectors,
            call.head_dim,
            keys,
            (key_block, 1, call.key_row),
            (d_weights, width),
            (d_query_t, width),
            True,
        )
    factor = splat(cast(call.plain_scale, zero))
    for at in range(0, call.head_dim * width, lanes):
        store(d_query_t + at, load(d_query_t + at) * factor)
    transpose(d_query_t, width, d_query, call.d_query_row, call.head_dim, rows, cast(1.0, zero))


@jit
def _backward_head(call, b, head, scratch, d_key, d_value):
    """One head of K and V, with every query head that shares it."""
    zero = call.zero
    lanes = lanes_of(zero)
    head_columns = (call.head_dim + lanes - 1) // lanes * lanes
    value_columns = (call.value_dim + lanes - 1) // lanes * lanes
    _fill(d_key, call.key_len * head_columns, zero)
    _fill(d_value, call.key_len * value_columns, zero)
    groups = call.heads // call.key_heads
    for h in range(head * groups, (head + 1) * groups):
        for start in range(0, call.query_len, VECTORS * lanes):
            _backward_tile(call, b, h, start, scratch, d_key, d_value)
    d_key_out = pointer(call.d_key, zero) + (b * call.d_key_batch + head * call.d_key_head)
    d_value_out = pointer(call.d_value, zero) + (b * call.d_value_batch + head * call.d_value_head)
    scale = cast(call.plain_scale, zero)
    _write_rows(d_key, head_columns, d_key_out, call.d_key_row, call.key_len, call.head_dim, scale)
    _write_rows(
        d_value,
        value_columns,
        d_value_out,
        call.d_value_row,
        call.key_len,
        call.value_dim,
        cast(1.0, zero),
    )


def _backward(argument):
    """All heads of K and V; a task is one, or all that share a bias gradient in a fixed order."""
    call = read(argument)
    zero = call.zero
    lanes = lanes_of(zero)
    head_columns = (call.head_dim + lanes - 1) // lanes * lanes
    value_columns = (call.value_dim + lanes - 1) // lanes * lanes
    tickets = integers_at(call.tickets)
    d_key = pointer(call.scratch, zero) + (
        take_ticket(tickets + 1) * call.scratch_bytes // item_size(zero)
    )
    d_value = d_key + call.key_len * head_columns
    scratch = d_value + call.key_len * value_columns
    while True:
        task = take_ticket(tickets)
        if task >= call.batch_tasks * call.head_tasks:
            break
        b, head = task // call.head_tasks, task % call.head_tasks
        b_end = b + 1 if call.batch_tasks == call.batch else call.batch
        head_end = head + 1 if call.head_tasks == call.key_heads else call.key_heads
        for each_b in range(b, b_end):
            for each_head in range(head, head_end):
                _backward_head(call, each_b, each_head, scratch, d_key, d_value)


BACKWARD = Kernel(_backward, (*INTEGERS, *_GRADIENTS), (*REALS, "plain_scale"))


def scratch_elements(width: int, lanes: int, key_len: int, head_dim: int, value_dim: int) -> int:
    """Elements of scratch that a thread of `BACKWARD` needs for tiles of `width` queries."""
    head, value = (-(-columns // lanes) * lanes for columns in (head_dim, value_dim))
    tile = width * (2 * head_dim + value_dim + 3 * BLOCK_KEYS + head + value + 5)
    return tile + key_len * (head + value)
