"""Attention forward: online softmax over blocks of keys, queries in the lanes.

For a tile of queries, with Q^T (D x width) scaled by scale * log2(e) once, each block of keys adds

    S^T = K Q^T;  m' = max(m, max_k S^T);  P^T = 2^(S^T - m');  l = l * 2^(m - m') + sum_k P^T
    O^T = O^T * 2^(m - m') + V^T drop(P^T)

so that maxima, sums and exponentials are lane-wise, with no reduction across a vector. At the end
out = O / l and lse = (m + log2 l) * ln 2 (Milakov & Gimelshein 2018; Dao et al. 2022).
"""

from __future__ import annotations

import math

import numpy as np

from .attention_tiles import (
    BLOCK_KEYS,
    INTEGERS,
    LN_2,
    REALS,
    add_bias,
    attends_none,
    drop_weights,
    in_range,
    key_ranges,
    tile_vectors,
)
from .call import Kernel, read
from .elementwise import exp2
from .jit import jit
from .microkernel import VECTORS, lanes_of, multiply, transpose
from .simd import (
    any_lane,
    as_integers32,
    cast,
    integers_at,
    item_size,
    load,
    load_integers,
    maximum,
    multiply_add,
    pointer,
    select,
    splat,
    store,
    take_ticket,
)


@jit
def _softmax_block(masked, k0, keys, width, scores, row_max, row_sum, rescale, first, last, zero):
    """Turn a block of scores into weights, and move the running maximum and sum.

    Leaves 2^(m - m') in `rescale` and returns whether any maximum moved.
    """
    lanes = lanes_of(scores)
    nothing = splat(cast(-math.inf, zero))
    zeros = splat(cast(0.0, zero))
    moved = False
    for v in range(0, width, lanes):
        before = load(row_max + v)
        after = before
        column = scores + v
        if masked:
            low = load_integers(as_integers32(first) + v, zero)
            high = load_integers(as_integers32(last) + v, zero)
            for k in range(keys):
                allowed = in_range(k0 + k, low, high, zero)
                score = select(allowed, load(column + k * width), nothing)
                store(column + k * width, score)
                after = maximum(score, after)
        else:
            for k in range(keys):
                after = maximum(load(column + k * width), after)
        moved = moved or any_lane(after > before)
        # a row with no key yet has m' = -inf; 0 in its place keeps the differences -inf
        shift = select(after == nothing, zeros, after)
        total = zeros
        for k in range(keys):
            weight = exp2(load(column + k * width) - shift)
            total = total + weight
            store(column + k * width, weight)
        factor = exp2(before - shift)
        store(row_max + v, after)
        store(rescale + v, factor)
        store(row_sum + v, multiply_add(load(row_sum + v), factor, total))
    return moved


@jit
def _scale_columns(matrix, rows, width, factors):
    """matrix[r, :] *= factors[:] for a (rows, width) matrix."""
    lanes = lanes_of(matrix)
    for v in range(0, width, lanes):
        factor = load(factors + v)
        for r in range(rows):
            at = matrix + (r * width + v)
            store(at, load(at) * factor)


@jit
def _finish(call, b, h, start, rows, width, out_t, row_max, row_sum, factors):
    """out = keep_scale * O / l and lse of the tile's rows; zeros and -inf where l = 0."""
    zero = call.zero
    lanes = lanes_of(out_t)
    zeros = splat(cast(0.0, zero))
    keep_scale = splat(cast(call.keep_scale, zero))
    for v in range(0, width, lanes):
        total = load(row_sum + v)
        empty = total == zeros
        store(factors + v, select(empty, zeros, keep_scale / total))
        for d in range(call.value_dim):
            at = out_t + (d * width + v)
            store(at, select(empty, zeros, load(at) * load(factors + v)))
    out = pointer(call.out, zero) + (b * call.out_batch + h * call.out_head + start * call.out_row)
    transpose(out_t, width, out, call.out_row, call.value_dim, rows, cast(1.0, zero))
    lse = pointer(call.lse, 0.0) + ((b * call.heads + h) * call.query_len + start)
    for r in range(rows):
        lse[r] = (row_max[r] + math.log2(np.float64(row_sum[r]))) * LN_2


@jit
def _forward_tile(call, b, h, start, scratch):
    """One tile of queries, `start` to at most `start` + VECTORS * LANES, of head (b, h)."""
    zero = call.zero
    lanes = lanes_of(zero)
    rows = min(VECTORS * lanes, call.query_len - start)
    vectors = tile_vectors(rows, zero)
    width = vectors * lanes

    query_t = scratch
    out_t = query_t + call.head_dim * width
    scores = out_t + call.value_dim * width
    bias = scores + BLOCK_KEYS * width
    row_max = bias + BLOCK_KEYS * width
    row_sum = row_max + width
    rescale = row_sum + width
    first = rescale + width
    last = first + width

    head = h // (call.heads // call.key_heads)
    query = pointer(call.query, zero) + (
        b * call.query_batch + h * call.query_head + start * call.query_row
    )
    key = pointer(call.key, zero) + (b * call.key_batch + head * call.key_head)
    value = pointer(call.value, zero) + (b * call.value_batch + head * call.value_head)

    begin, end, common_first, common_last = key_ranges(call, b, start, rows, width, first, last)
    for v in range(0, width, lanes):
        store(row_max + v, splat(cast(-math.inf, zero)))
        store(row_sum + v, splat(cast(0.0, zero)))
    if begin < end:
        if rows < width:
            for at in range(0, call.head_dim * width, lanes):
                store(query_t + at, splat(cast(0.0, zero)))
        transpose(
            query, call.query_row, query_t, width, rows, call.head_dim, cast(call.scale, zero)
        )
    started = False
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
        if call.bias != 0 or call.dense != 0:
            add_bias(call, b, h, start, rows, width, k0, keys, scores, bias)
        masked = k0 < common_first or k0 + keys - 1 > common_last
        moved = _softmax_block(
            masked, k0, keys, width, scores, row_max, row_sum, rescale, first, last, zero
        )
        if moved and started:
            _scale_columns(out_t, call.value_dim, width, rescale)
        if call.dropout != 0:
            drop_weights(call, b, h, start, width, k0, keys, scores)
        multiply(
            vectors,
            call.value_dim,
            keys,
            (value_block, 1, call.value_row),
            (scores, width),
            (out_t, width),
            started,
        )
        started = True
    if not started:
        for at in range(0, call.value_dim * width, lanes):
            store(out_t + at, splat(zero))
    _finish(call, b, h, start, rows, width, out_t, row_max, row_sum, rescale)


def _forward(argument):
    """All tiles of all heads; a task is one tile, the last tiles (the longest under a causal mask)
    first."""
    call = read(argument)
    tickets = integers_at(call.tickets)
    lanes = lanes_of(call.zero)
    tiles = (call.query_len + VECTORS * lanes - 1) // (VECTORS * lanes)
    scratch = pointer(call.scratch, call.zero) + (
        take_ticket(tickets + 1) * call.scratch_bytes // item_size(call.zero)
    )
    while True:
        task = take_ticket(tickets)
        if task >= call.batch * call.heads * tiles:
            break
        head, tile = task // tiles, tiles - 1 - task % tiles
        _forward_tile(call, head // call.heads, head % call.heads, tile * VECTORS * lanes, scratch)


FORWARD = Kernel(_forward, INTEGERS, REALS)


def scratch_elements(width: int, head_dim: int, value_dim: int) -> int:
    """Elements of scratch that a thread of `FORWARD` needs for tiles of `width` queries."""
    return width * (head_dim + value_dim + 2 * BLOCK_KEYS + 5)
