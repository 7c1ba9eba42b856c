"""Attention of a few queries over many keys: decoding with a cache of K and V, keys in the lanes.

One query fills one lane of sixteen, so here a row of scores is a row in memory, and all query heads
that share a head of K and V, a row each, go over it together: K and V are read once. With
chunk c of the keys and rows r = (query head, query) a task computes

    S = scale * Q K^T;  m_c = max_k S;  P = 2^(S - m_c);  l_c = sum_k P;  O_c = drop(P) V

and whoever finishes the last chunk of a head merges them in their order, so that the bits do not
depend on the threads (Dao et al. 2023, 'Flash-Decoding'):

    m = max_c m_c;  l = sum_c 2^(m_c - m) l_c;  out = sum_c 2^(m_c - m) O_c / l

and lse = (m + log2 l) * ln 2.
"""

from __future__ import annotations

import math

import numpy as np

from ..cpu_common.call_records import ATTENTION
from ..cpu_common.constants import CHUNK_KEYS, ITEM_COMPUTED, LN_2, LOG2_E
from .attention_rows import copy_rows, readable, write_rows
from .attention_tiles import attends_none, highest_key, limits, lowest_key, sequence_of
from .call import Kernel, read
from .gemm import dots, lanes_of, multiply
from .jit import jit
from .memory import (
    add_across,
    bytes_at,
    finish_task,
    integers_at,
    item_size,
    load,
    load_first,
    pointer,
    store,
    take_work,
)
from .philox import at_least, philox_columns
from .vector import (
    add_lanes,
    cast,
    lane_floats,
    lane_numbers,
    largest_lane,
    maximum,
    multiply_add,
    select,
    splat,
    splat_integer,
)
from .vector_math import exp2, tanh

_WIDENED_KEYS = 32  # of V at a time


@jit
def _padded(call, address, offset, row, rows, dim, columns, scratch):
    """Rows of K or V as (pointer, row stride), their `dim` elements padded to `columns`."""
    if dim == columns:
        return readable(call.item_type, address, offset, row, rows, dim, scratch, call.zero)
    # `scratch` begins with a zero for each key: no row is dead
    to = scratch + CHUNK_KEYS
    copy_rows(call.item_type, address, offset, row, to, columns, rows, dim, scratch, call.zero)
    return to, columns


@jit
def _score_rows(call, at, keys, query, rows, columns, scores, scores_row, sums, wide_rows):
    """scores[r, k] = sum_c query[r, c] * key[k, c]; whole vectors are stored.

    Keys that have to be widened are so a vector of them at a time: they stay in the nearest cache.
    """
    lanes = lanes_of(scores)
    for k in range(0, keys, lanes):
        count = min(lanes, keys - k)
        key, key_row = _padded(
            *(call, call.key, at + k * call.key_row, call.key_row),
            *(count, call.head_dim, columns, wide_rows),
        )
        r = 0
        while r < rows:
            together = 4 if r + 4 <= rows else 1
            row = query + r * columns
            for n in range(count):
                # key by key: the order in memory, which the hardware's prefetching follows
                from_key, to = key + n * key_row, sums + n * lanes
                if together == 4:
                    dots(4, columns, row, columns, from_key, to, lanes * lanes)
                else:
                    dots(1, columns, row, columns, from_key, to, lanes * lanes)
            for each in range(together):
                total = add_across(sums + each * lanes * lanes)
                store(scores + ((r + each) * scores_row + k), total)
            r += together


@jit
def _add_terms(call, b, h, i, k0, keys, scores, scratch):
    """What `attention_tiles.add_terms` does, for one row: scores[k] of keys k0 + k."""
    zero = call.zero
    lanes = lanes_of(scores)
    nothing = splat(cast(-math.inf, zero))
    if call.alibi != 0:
        slope = pointer(call.alibi, 0.0)[b * call.alibi_batch + h]
        position = i + integers_at(call.alibi_offset)[b * call.alibi_offset_batch]
        decay = splat(cast(-LOG2_E * slope, zero))
        zeros = splat(cast(0.0, zero))
        for v in range(0, keys, lanes):
            distance = splat(cast(float(k0 + v - position), zero)) + lane_floats(zero)
            distance = maximum(distance, zeros - distance)
            store(scores + v, multiply_add(distance, decay, load(scores + v)))
    if call.bias != 0:
        offset = b * call.bias_batch + h * call.bias_head
        offset += i * call.bias_row + k0 * call.bias_column
        columns = 1 if call.bias_column == 0 else keys
        source, _ = readable(call.bias_item_type, call.bias, offset, 0, 1, columns, scratch, zero)
        factor = splat(cast(LOG2_E, zero))
        for v in range(0, keys, lanes):
            added = splat(source[0])
            if call.bias_column != 0:
                added = load_first(source + v, keys - v)
            total = multiply_add(added, factor, load(scores + v))
            store(scores + v, select(added == nothing, nothing, total))
    minus_infinity = cast(-math.inf, zero)
    if call.dense != 0:
        allowed = bytes_at(call.dense) + (b * call.dense_batch + h * call.dense_head)
        allowed = allowed + (i * call.dense_row + k0 * call.dense_column)
        for k in range(keys):
            if allowed[k * call.dense_column] == 0:
                scores[k] = minus_infinity
    if call.query_documents != 0:
        own = integers_at(call.query_documents)[b * call.query_documents_batch + i]
        ids = integers_at(call.key_documents) + (b * call.key_documents_batch + k0)
        for k in range(keys):
            if ids[k] != own:
                scores[k] = minus_infinity


@jit
def _cap_and_scale(call, scores, keys):
    zero = call.zero
    scale, cap = splat(cast(call.scale, zero)), splat(cast(call.cap, zero))
    for v in range(0, keys, lanes_of(scores)):
        score = load(scores + v) * scale
        if call.cap != 0.0:
            score = tanh(score) * cap
        store(scores + v, score)


@jit
def _weigh_row(call, scores, first, last, keys):
    """Scores to weights in place; (m, l) of the row. Keys outside first <= k <= last weigh 0."""
    zero = call.zero
    lanes = lanes_of(scores)
    nothing, zeros = splat(cast(-math.inf, zero)), splat(cast(0.0, zero))
    low, high = splat_integer(first, zero), splat_integer(last, zero)
    largest = nothing
    for v in range(0, keys, lanes):
        k = lane_numbers(zero) + splat_integer(v, zero)
        score = select((low <= k) & (k <= high), load(scores + v), nothing)
        store(scores + v, score)
        largest = maximum(score, largest)
    row_max = largest_lane(largest)
    shift = row_max
    if row_max == -math.inf:
        shift = zero
    total = zeros
    for v in range(0, keys, lanes):
        weight = exp2(load(scores + v) - splat(shift))
        total = total + weight
        store(scores + v, weight)
    return row_max, add_lanes(total)


@jit
def _drop_row(call, b, h, i, k0, keys, weights):
    """Zero the weights of one row that dropout drops; k0 is a multiple of 4."""
    zero = call.zero
    lanes = lanes_of(weights)
    zeros = splat(zero)
    for v in range(0, keys, 4 * lanes):
        group = (k0 + v) // 4
        words = philox_columns(group, i, h, b + call.batch_start, call.seed, zero)
        for n in range(4):
            word = words[0]
            if n == 1:
                word = words[1]
            elif n == 2:
                word = words[2]
            elif n == 3:
                word = words[3]
            if v + n * lanes < keys:
                at = weights + (v + n * lanes)
                store(at, select(at_least(word, call.threshold), load(at), zeros))


@jit
def _add_values(call, at, keys, weights, weights_row, rows, totals, columns, wide_rows):
    """totals = weights V; what has to be widened goes in blocks that the nearest cache holds."""
    lanes = lanes_of(weights)
    step = keys
    if call.item_type != ITEM_COMPUTED:
        step = _WIDENED_KEYS
    for k in range(0, keys, step):
        count = min(step, keys - k)
        value, value_row = _padded(
            *(call, call.value, at + k * call.value_row, call.value_row),
            *(count, call.value_dim, columns, wide_rows),
        )
        left, right = (weights + k, weights_row, 1), (value, value_row)
        multiply(columns // lanes, rows, count, left, right, (totals, columns), k > 0)


@jit
def _decode_chunk(call, b, head, chunk, scratch, partial):
    """m, l and O of each row of one chunk, into `partial`: m and l fill a vector each."""
    zero = call.zero
    lanes = lanes_of(zero)
    batch_index, first_query, first_key, query_len, key_len = sequence_of(call, b)
    group = call.heads // call.key_heads
    rows = group * query_len
    head_columns = (call.head_dim + lanes - 1) // lanes * lanes
    columns = (call.value_dim + lanes - 1) // lanes * lanes
    scores_row = CHUNK_KEYS + lanes
    query = scratch
    scores = query + rows * head_columns
    totals = scores + rows * scores_row
    sums = totals + rows * columns
    bias = sums + 4 * lanes * lanes
    wide_rows = bias + scores_row  # zeros, then a padded or widened chunk of K or V

    lower, upper, queries, counted, prefix = limits(call, b, query_len, key_len)
    k0 = chunk * CHUNK_KEYS
    begin, end = key_len, 0
    for i in range(min(query_len, queries)):
        low, high = lowest_key(i, lower), highest_key(i, upper, counted, prefix)
        if low <= high:
            begin, end = min(begin, low), max(end, high + 1)
    begin, end = max(begin, k0), min(end, k0 + CHUNK_KEYS)
    seen = False
    if begin < end:
        for g in range(group):
            h = head * group + g
            seen = seen or not attends_none(call, b, h, 0, query_len, begin, end - begin)
    for r in range(rows):
        store(partial + r * (2 * lanes + columns), splat(cast(-math.inf, zero)))
        store(partial + (r * (2 * lanes + columns) + lanes), splat(zero))
    if not seen:
        return

    for r in range(CHUNK_KEYS):
        wide_rows[r] = zero
    for g in range(group):
        at = batch_index * call.query_batch + (head * group + g) * call.query_head
        copy_rows(
            *(call.item_type, call.query, at + first_query * call.query_row, call.query_row),
            *(query + g * query_len * head_columns, head_columns, query_len, call.head_dim),
            *(wide_rows, zero),
        )
    keys, skipped = end - k0, begin - k0
    at = batch_index * call.key_batch + head * call.key_head + (first_key + begin) * call.key_row
    _score_rows(
        *(call, at, end - begin, query, rows, head_columns),
        *(scores + skipped, scores_row, sums, wide_rows),
    )
    for r in range(rows):
        h, i = head * group + r // query_len, r % query_len
        row = scores + r * scores_row
        _cap_and_scale(call, row + skipped, end - begin)
        _add_terms(call, b, h, i, begin, end - begin, row + skipped, bias)
        low, high = lowest_key(i, lower) - k0, highest_key(i, upper, counted, prefix) - k0
        if i >= queries:
            low, high = 0, -1
        low, high = max(low, 0), min(high, CHUNK_KEYS)
        row_max, row_sum = _weigh_row(call, row, low, high, keys)
        store(partial + r * (2 * lanes + columns), splat(row_max))
        store(partial + (r * (2 * lanes + columns) + lanes), splat(row_sum))
        if call.dropout != 0:
            _drop_row(call, b, h, i, k0, keys, row)
    at = (
        batch_index * call.value_batch
        + head * call.value_head
        + (first_key + begin) * call.value_row
    )
    _add_values(
        *(call, at, end - begin, scores + skipped, scores_row), *(rows, totals, columns, wide_rows)
    )
    for r in range(rows):
        for c in range(0, columns, lanes):
            to = partial + (r * (2 * lanes + columns) + 2 * lanes + c)
            store(to, load(totals + (r * columns + c)))


@jit
def _merge_chunks(call, b, head, partial, partial_chunk, scratch):
    """out and lse of a head's rows from its chunks."""
    zero = call.zero
    lanes = lanes_of(zero)
    batch_index, first_query, _, query_len, key_len = sequence_of(call, b)
    group = call.heads // call.key_heads
    columns = (call.value_dim + lanes - 1) // lanes * lanes
    chunks = (key_len + CHUNK_KEYS - 1) // CHUNK_KEYS
    for r in range(group * query_len):
        h, i = head * group + r // query_len, r % query_len
        largest, total = -math.inf, 0.0
        if call.sinks != 0:
            largest = np.float64(pointer(call.sinks, 0.0)[h]) * LOG2_E
        first = partial + r * (2 * lanes + columns)
        sink = largest
        for chunk in range(chunks):
            largest = max(largest, np.float64((first + chunk * partial_chunk)[0]))
        shift = 0.0 if largest == -math.inf else largest
        if call.sinks != 0:
            total = 2.0 ** (sink - shift)
        for c in range(0, columns, lanes):
            store(scratch + c, splat(zero))
        for chunk in range(chunks):
            at = first + chunk * partial_chunk
            row_sum = np.float64(at[lanes])
            if row_sum == 0.0:
                continue
            factor = 2.0 ** (np.float64(at[0]) - shift)
            total += factor * row_sum
            factors = splat(cast(factor, zero))
            for c in range(0, columns, lanes):
                sum_so_far = load(scratch + c)
                store(scratch + c, multiply_add(load(at + (2 * lanes + c)), factors, sum_so_far))
        factor = 0.0
        row_lse = -math.inf
        if total != 0.0:  # a sum, or NaN
            factor = call.keep_scale / total
            row_lse = (shift + math.log2(total)) * LN_2
        offset = batch_index * call.out_batch + h * call.out_head + (first_query + i) * call.out_row
        write_rows(
            *(call.item_type, call.out, offset, call.out_row),
            *(scratch, columns, 1, call.value_dim, cast(factor, zero)),
        )
        row = (batch_index * call.heads + h) * call.query_rows + first_query + i
        if call.lse == 0:
            continue
        if call.item_type == ITEM_COMPUTED:
            (pointer(call.lse, 0.0) + row)[0] = row_lse
        else:
            (pointer(call.lse, zero) + row)[0] = cast(row_lse, zero)


def decode(argument):
    """All chunks of all heads of K and V; the last to finish one of a head merges them."""
    call = read(argument)
    zero = call.zero
    lanes = lanes_of(zero)
    counters = integers_at(call.work_counter)
    scratch = pointer(call.scratch, zero) + (
        take_work(counters + 1) * call.scratch_bytes // item_size(zero)
    )
    columns = (call.value_dim + lanes - 1) // lanes * lanes
    group = call.heads // call.key_heads
    partial_chunk = group * min(call.max_decode_queries, call.query_len) * (2 * lanes + columns)
    while True:
        task = take_work(counters)
        if task >= call.batch * call.key_heads * call.chunks:
            break
        plane, chunk = task // call.chunks, task % call.chunks
        b, head = plane // call.key_heads, plane % call.key_heads
        _, _, _, query_len, _ = sequence_of(call, b)
        if query_len > call.max_decode_queries:
            continue
        partial = pointer(call.partials, zero) + plane * call.chunks * partial_chunk
        _decode_chunk(call, b, head, chunk, scratch, partial + chunk * partial_chunk)
        if (
            call.chunks == 1
            or finish_task(integers_at(call.chunks_done) + plane) == call.chunks - 1
        ):
            _merge_chunks(call, b, head, partial, partial_chunk, scratch)


DECODE = Kernel(decode, ATTENTION.fields("decode"))


def partial_elements(rows: int, lanes: int, value_dim: int) -> int:
    """Elements that a chunk of one head leaves."""
    return rows * (2 * lanes + -(-value_dim // lanes) * lanes)


def scratch_elements(rows: int, lanes: int, head_dim: int, value_dim: int) -> int:
    """Elements of scratch that a thread of `DECODE` needs for `rows` rows."""
    head, value = (-(-columns // lanes) * lanes for columns in (head_dim, value_dim))
    row = CHUNK_KEYS + lanes
    wide_rows = CHUNK_KEYS * (1 + max(head, value))
    return rows * (head + row + value) + 4 * lanes * lanes + row + wide_rows
