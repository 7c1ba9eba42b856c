"""Attention forward: online softmax over blocks of keys, queries in the lanes.

For a tile of queries, with scale * log2(e) in the scores, each block of keys adds

    S^T = K Q^T;  m' = max(m, max_k S^T);  P^T = 2^(S^T - m');  l = l * 2^(m - m') + sum_k P^T
    O^T = O^T * 2^(m - m') + V^T drop(P^T)

so that maxima, sums and exponentials are lane-wise, with no reduction across a vector. At the end
out = O / l and lse = (m + log2 l) * ln 2 (Milakov & Gimelshein 2018; Dao et al. 2022). A sink is a
key of weight 2^(sink - m) without a value: it starts m and l. `attention_products` has the two
products, in float32 or in pairs of bfloat16.
"""

from __future__ import annotations

import math

import numpy as np

from ..cpu_common.call_records import ATTENTION
from ..cpu_common.constants import BLOCK_KEYS, ITEM_COMPUTED, LN_2, LOG2_E
from .attention_products import load_query, score_product, value_product, wide_block, write_out
from .attention_rows import prefetch_rows, prefetch_target
from .attention_tiles import (
    add_terms,
    attends_none,
    block_end,
    cap_scores,
    drop_weights,
    has_terms,
    in_range,
    key_ranges,
    sequence_of,
    tile_vectors,
)
from .call import Kernel, read
from .gemm import lanes_of
from .jit import jit
from .memory import (
    as_integers32,
    integers_at,
    item_size,
    load,
    load_integers,
    pointer,
    store,
    store_first,
    take_work,
)
from .vector import (
    any_lane,
    cast,
    maximum,
    multiply_add,
    narrowed,
    select,
    splat,
    splat_like,
    widened,
)
from .vector_math import exp2, log2_wide

_QUERY, _KEY, _VALUE, _OUT = range(4)


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
def _finish(call, b, h, start, rows, width, out_t, row_max, row_sum, factors, scratch):
    """out = keep_scale * O / l and lse of the tile's rows; zeros and -inf where l = 0."""
    zero = call.zero
    lanes = lanes_of(out_t)
    zeros = splat(cast(0.0, zero))
    keep_scale = splat(cast(call.keep_scale, zero))
    batch_index, first_query, _, _, _ = sequence_of(call, b)
    for v in range(0, width, lanes):
        total = load(row_sum + v)
        store(factors + v, select(total == zeros, zeros, keep_scale / total))
    offset = batch_index * call.out_batch + h * call.out_head + (first_query + start) * call.out_row
    write_out(call, offset, rows, width, out_t, factors, scratch)
    row = (batch_index * call.heads + h) * call.query_rows + first_query + start
    if call.lse == 0:
        return
    for v in range(0, rows, lanes):
        total, largest = load(row_sum + v), load(row_max + v)
        # m = -inf where l = 0; l - l is 0, or NaN where a score was
        row_lse = widened(largest) + log2_wide(total) + (widened(total) - widened(total))
        row_lse = row_lse * splat_like(LN_2, row_lse)
        if call.item_type == ITEM_COMPUTED:
            store_first(pointer(call.lse, 0.0) + (row + v), row_lse, rows - v)
        else:
            narrow = narrowed(row_lse, zero)
            store_first(pointer(call.lse, zero) + (row + v), narrow, rows - v)


@jit
def _prefetch(call, plane, what):
    """Ask for a part of a short head, which would begin by waiting for memory.

    A tile does so for the head after it, a part before each of its own steps: a core that asks for
    a whole head at once waits until most of it has come.
    """
    zero = call.zero
    b, h = plane // call.heads, plane % call.heads
    batch_index, first_query, first_key, query_len, key_len = sequence_of(call, b)
    head = h // (call.heads // call.key_heads)
    if what == _QUERY:
        at = batch_index * call.query_batch + h * call.query_head + first_query * call.query_row
        prefetch_rows(
            call.item_type, call.query, at, call.query_row, query_len, call.head_dim, zero
        )
    elif what == _KEY:
        at = batch_index * call.key_batch + head * call.key_head + first_key * call.key_row
        prefetch_rows(call.item_type, call.key, at, call.key_row, key_len, call.head_dim, zero)
    elif what == _VALUE:
        at = batch_index * call.value_batch + head * call.value_head + first_key * call.value_row
        prefetch_rows(call.item_type, call.value, at, call.value_row, key_len, call.value_dim, zero)
    else:
        at = batch_index * call.out_batch + h * call.out_head + first_query * call.out_row
        prefetch_target(call.item_type, call.out, at, call.out_row, query_len, call.value_dim, zero)


@jit
def _prefetch_tile(call, b, h, start, rows):
    """Ask for a tile's rows of out, and for the queries of the tile before it in the head, which
    comes next."""
    zero = call.zero
    batch_index, first_query, _, _, _ = sequence_of(call, b)
    row = first_query + start
    at = batch_index * call.out_batch + h * call.out_head + row * call.out_row
    prefetch_target(call.item_type, call.out, at, call.out_row, rows, call.value_dim, zero)
    if start > 0:
        at = batch_index * call.query_batch + h * call.query_head
        at += (row - call.tile) * call.query_row
        prefetch_rows(
            call.item_type, call.query, at, call.query_row, call.tile, call.head_dim, zero
        )


@jit
def _forward_tile(call, b, h, start, following, wide, scratch):
    """One tile of queries, `start` to at most `start` + call.tile, of head (b, h)."""
    zero = call.zero
    lanes = lanes_of(zero)
    batch_index, first_query, first_key, query_len, key_len = sequence_of(call, b)
    rows = min(call.tile, query_len - start)
    if rows <= 0 or query_len <= call.max_decode_queries:
        return
    vectors = tile_vectors(rows, zero)
    width = vectors * lanes

    query_t = scratch
    out_t = query_t + (call.head_dim + lanes - 1) // lanes * lanes * width
    scores = out_t + call.value_dim * width
    terms = scores + BLOCK_KEYS * width
    row_max = terms + BLOCK_KEYS * width
    row_sum = row_max + width
    rescale = row_sum + width
    first = rescale + width
    last = first + width
    wide_rows = last + width  # of half types: query, then a block of keys or values, then out

    head = h // (call.heads // call.key_heads)
    key = batch_index * call.key_batch + head * call.key_head + first_key * call.key_row
    value = batch_index * call.value_batch + head * call.value_head + first_key * call.value_row

    begin, end, common_first, common_last = key_ranges(
        call, b, start, rows, width, query_len, key_len, first, last
    )
    start_max, start_sum = -math.inf, 0.0
    if call.sinks != 0:
        sink = pointer(call.sinks, 0.0)[h] * LOG2_E
        start_max = np.float64(cast(sink, zero))
        # e^x of what rounding took from the sink, by its series; nothing of a huge one
        x = (sink - start_max) * LN_2
        start_sum = 1.0 + x + 0.5 * x * x if -1.0 < x < 1.0 else 1.0
    for v in range(0, width, lanes):
        store(row_max + v, splat(cast(start_max, zero)))
        store(row_sum + v, splat(cast(start_sum, zero)))
    if following >= 0:
        _prefetch(call, b * call.heads + h, _OUT)
        _prefetch(call, following, _QUERY)
    if begin < end:
        offset = batch_index * call.query_batch + h * call.query_head
        offset += (first_query + start) * call.query_row
        load_query(call, offset, rows, width, query_t, wide_rows, scores)
    started = False
    k0 = begin
    while k0 < end:
        keys = block_end(k0, end) - k0
        if attends_none(call, b, h, start, rows, k0, keys):
            k0 += keys
            continue
        key_at, value_at = key + k0 * call.key_row, value + k0 * call.value_row
        block = wide_block(call, wide, k0, key_len)
        score_product(call, vectors, keys, key_at, query_t, scores, width, wide_rows, block)
        if following >= 0 and not started:
            _prefetch(call, following, _KEY)
        elif not started:
            _prefetch_tile(call, b, h, start, rows)
        if call.cap != 0.0:
            cap_scores(cast(call.cap, zero), scores, terms, keys * width)
        if has_terms(call):
            add_terms(call, b, h, start, rows, width, k0, keys, scores, terms)
        masked = k0 < common_first or k0 + keys - 1 > common_last
        moved = _softmax_block(
            masked, k0, keys, width, scores, row_max, row_sum, rescale, first, last, zero
        )
        if following >= 0 and not started:
            _prefetch(call, following, _VALUE)
        if call.dropout != 0:
            drop_weights(call, b, h, start, width, k0, keys, scores)
        value_product(
            call,
            vectors,
            keys,
            value_at,
            scores,
            out_t,
            rescale,
            moved,
            started,
            width,
            wide_rows,
            block,
        )
        started = True
        k0 += keys
    if not started:
        for at in range(0, call.value_dim * width, lanes):
            store(out_t + at, splat(zero))
    _finish(call, b, h, start, rows, width, out_t, row_max, row_sum, rescale, wide_rows)


def _kept_elements(key_len, head_dim, value_dim, lanes):
    """Elements of a head of K and V that is kept widened (`wide_block`), in whole vectors."""
    blocks = (key_len + BLOCK_KEYS - 1) // BLOCK_KEYS
    return (blocks + key_len * (head_dim + value_dim) + lanes - 1) // lanes * lanes


kept_elements = jit(_kept_elements)


def forward(argument):
    """All tiles of all heads; a task is one tile, the last tiles (the longest under a causal mask)
    first."""
    call = read(argument)
    counters = integers_at(call.work_counter)
    tiles = (call.query_len + call.tile - 1) // call.tile
    scratch = pointer(call.scratch, call.zero) + (
        take_work(counters + 1) * call.scratch_bytes // item_size(call.zero)
    )
    wide, groups, key_head = scratch, call.heads // call.key_heads, -1
    if call.keeps_wide != 0:
        lanes = lanes_of(call.zero)
        scratch = scratch + kept_elements(call.key_len, call.head_dim, call.value_dim, lanes)
    tasks = call.batch * call.heads * tiles
    while True:
        first = take_work(counters) * call.tasks_per_grab
        if first >= tasks:
            break
        for task in range(first, min(first + call.tasks_per_grab, tasks)):
            following = -1
            if (task + 1) % tiles == 0 and task + 1 < min(first + call.tasks_per_grab, tasks):
                following = (task + 1) // tiles
            head, start = task // tiles, (tiles - 1 - task % tiles) * call.tile
            if call.keeps_wide != 0 and head // groups != key_head:
                key_head = head // groups
                for block in range((call.key_len + BLOCK_KEYS - 1) // BLOCK_KEYS):
                    wide[block] = call.zero
            _forward_tile(
                call, head // call.heads, head % call.heads, start, following, wide, scratch
            )


FORWARD = Kernel(forward, ATTENTION.fields("forward"))


def scratch_elements(
    width: int, lanes: int, head_dim: int, value_dim: int, half: bool, kept: int
) -> int:
    """Elements of scratch that a thread of `FORWARD` needs for tiles of `width` queries, where
    `kept` keys of a head are kept widened."""
    query_rows = -(-head_dim // lanes) * lanes  # in pairs: half as many, in whole vectors
    elements = width * (query_rows + value_dim + 2 * BLOCK_KEYS + 5)
    if half:
        elements += BLOCK_KEYS * (max(head_dim, value_dim) + lanes)
    return elements + (_kept_elements(kept, head_dim, value_dim, lanes) if kept > 0 else 0)
