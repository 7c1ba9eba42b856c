"""Attention backward: chunks of keys outside, query tiles inside, blocks of a chunk innermost.

Every product is done once, and each sum has one order, whatever the number of threads. With
P recomputed from lse, M = dropout's keep mask / (1 - p) and delta = sum_k(dO * O) - dlse:

    S^T = K Q^T        P^T = 2^(S^T - lse * log2 e)       (Q^T scaled by scale * log2 e)
    dP^T = V dO^T      dS^T = P^T * (M^T * dP^T - delta)  d_bias += dS
    dV += (P * M)^T dO     dK += scale * dS^T Q           columns of the head in the lanes
    dQ^T += scale * K^T dS^T                              queries in the lanes

(Dao et al. 2022, algorithm 4; a softcap multiplies dS by its derivative after d_bias.) lse * log2 e
comes as a rounded value and the rest of it.

A task is one head of K and V, with all query heads that share it, the last tile first. Where there
are few heads it is one chunk of keys of a head, and a tile of dQ has a semaphore: chunk after chunk
adds its blocks' parts to it, in the same order as one task alone, so that the bits are the same.
Tasks are taken in order: whoever is waited for is being worked on.
"""

from __future__ import annotations

import math

import numpy as np

from ..cpu_common.call_records import ATTENTION
from ..cpu_common.constants import BLOCK_KEYS, ITEM_COMPUTED, LOG2_E
from .attention_backward_blocks import gradient_block, store_bias_gradient
from .attention_backward_products import add_products, load_tile, score_products
from .attention_rows import copy_rows, dot_rows, prefetch_rows, write_rows
from .attention_tiles import (
    add_terms,
    attends_none,
    block_end,
    cap_scores,
    has_terms,
    key_ranges,
    sequence_of,
    tile_vectors,
)
from .call import Kernel, read
from .gemm import VECTORS, lanes_of
from .jit import jit
from .memory import (
    as_integers32,
    integers_at,
    item_size,
    load,
    pointer,
    publish,
    published,
    store,
    take_work,
    yield_processor,
)
from .transpose import transpose
from .vector import cast, splat

_QUERY, _KEY, _VALUE, _OUT, _GRAD_OUT = range(5)


@jit
def _fill(target, elements, value):
    """The first `elements` (a multiple of the lanes) of `target` set to `value`."""
    for at in range(0, elements, lanes_of(target)):
        store(target + at, splat(value))


@jit
def _read_lse(call, row, rows, lse2, rest, first, last):
    """lse * log2 e, rounded, and the rest of it; whether some row of the tile attends nothing.

    Such a row has lse2 = +inf, which makes its weights 2^-inf = 0.
    """
    zero = call.zero
    lse = pointer(call.lse, 0.0) + row
    firsts, lasts = as_integers32(first), as_integers32(last)
    dead = False
    for r in range(rows):
        if lse[r] == -math.inf or lasts[r] < firsts[r]:
            dead = True
            lse2[r] = cast(math.inf, zero)
            rest[r] = zero
        else:
            both = lse[r] * LOG2_E
            lse2[r] = cast(both, zero)
            rest[r] = cast(both - lse2[r], zero)
    return dead


@jit
def _finish_delta(call, row, rows, lse2, delta, keep):
    """delta -= dlse; with `keep` a copy of it for the gradient of the sinks."""
    zero = call.zero
    for r in range(rows):
        if lse2[r] == math.inf:
            delta[r] = zero
        if call.grad_lse != 0 and (pointer(call.lse, 0.0) + row)[r] != -math.inf:
            delta[r] -= cast((pointer(call.grad_lse, 0.0) + row)[r], zero)
        if keep and call.delta != 0:
            (pointer(call.delta, 0.0) + row)[r] = np.float64(delta[r])


@jit
def _store_query_gradient(call, batch_index, h, row, d_query_t, width, rows, scratch):
    """d_query = scale * (d_query_t)^T; `row` counts from the start of the tensor."""
    zero = call.zero
    lanes = lanes_of(zero)
    offset = batch_index * call.d_query_batch + h * call.d_query_head + row * call.d_query_row
    factor = cast(call.score_scale, zero)
    if call.item_type == ITEM_COMPUTED:
        target = pointer(call.d_query, zero) + offset
        transpose(d_query_t, width, target, call.d_query_row, call.head_dim, rows, factor)
        return
    columns = (call.head_dim + lanes - 1) // lanes * lanes
    transpose(d_query_t, width, scratch, columns, call.head_dim, rows, factor)
    write_rows(
        *(call.item_type, call.d_query, offset, call.d_query_row),
        *(scratch, columns, rows, call.head_dim, cast(1.0, zero)),
    )


@jit
def _accumulate_dq(call, b, h, start, before, last, parts, blocks, width):
    """Add the blocks' parts of a tile's dQ to its sum, after `before` chunks; returns the sum."""
    zero = call.zero
    size = call.head_dim * width
    tiles = (call.query_len + call.tile - 1) // call.tile
    tile = (b * call.heads + h) * tiles + start // call.tile
    semaphore = integers_at(call.dq_semaphore) + tile
    total = pointer(call.dq_accumulator, zero) + tile * call.head_dim * call.tile
    while published(semaphore) < before:
        yield_processor()
    if before == 0:
        _fill(total, size, zero)
    for block in range(blocks):
        for at in range(0, size, lanes_of(zero)):
            store(total + at, load(total + at) + load(parts + (block * size + at)))
    if not last:
        publish(semaphore, before + 1)
    return total


@jit
def _prefetch(call, plane, what):
    """Ask for a part of what the first query head of a head of K and V reads, as the forward pass
    does: `attention_forward._prefetch`."""
    zero = call.zero
    b, head = plane // call.key_heads, plane % call.key_heads
    batch_index, first_query, first_key, query_len, key_len = sequence_of(call, b)
    h = head * (call.heads // call.key_heads)
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
    elif what == _GRAD_OUT:
        at = batch_index * call.grad_out_batch + h * call.grad_out_head
        at += first_query * call.grad_out_row
        prefetch_rows(
            call.item_type, call.grad_out, at, call.grad_out_row, query_len, call.value_dim, zero
        )
    else:
        at = batch_index * call.out_batch + h * call.out_head + first_query * call.out_row
        prefetch_rows(call.item_type, call.out, at, call.out_row, query_len, call.value_dim, zero)


@jit
def _backward_tile(call, b, h, start, chunk, following, scratch, d_key, d_value):
    """One tile of queries and one chunk of keys: adds to its d_query and to the chunk's d_key and
    d_value in scratch."""
    zero = call.zero
    lanes = lanes_of(zero)
    batch_index, first_query, first_key, query_len, key_len = sequence_of(call, b)
    rows = min(call.tile, query_len - start)
    vectors = tile_vectors(rows, zero)
    width = vectors * lanes
    head_columns = (call.head_dim + lanes - 1) // lanes * lanes
    value_columns = (call.value_dim + lanes - 1) // lanes * lanes

    query_t = scratch
    d_query_t = query_t + call.head_dim * width
    grad_out_t = d_query_t + call.head_dim * width
    scores = grad_out_t + call.value_dim * width
    d_weights = scores + BLOCK_KEYS * width
    terms = d_weights + BLOCK_KEYS * width
    query_rows = terms + BLOCK_KEYS * width
    grad_out_rows = query_rows + head_columns * width
    lse2 = grad_out_rows + value_columns * width
    rest = lse2 + width
    delta = rest + width
    first = delta + width
    last = first + width
    ones = last + width
    parts = ones + VECTORS * lanes
    slopes = parts
    if call.chunk_tasks > 1:
        slopes = parts + call.chunk_keys // BLOCK_KEYS * call.head_dim * width
    key_rows = slopes
    if call.cap != 0.0:
        key_rows = slopes + BLOCK_KEYS * width

    begin, end, common_first, common_last = key_ranges(
        call, b, start, rows, width, query_len, key_len, first, last
    )
    chunk_begin = chunk * call.chunk_keys
    first_chunk, last_chunk = 0, 0
    if begin < end:
        first_chunk, last_chunk = begin // call.chunk_keys, (end - 1) // call.chunk_keys
    begin, end = max(begin, chunk_begin), min(end, chunk_begin + call.chunk_keys)
    if begin >= end and chunk != first_chunk:
        return

    head = h // (call.heads // call.key_heads)
    row = (batch_index * call.heads + h) * call.query_rows + first_query + start
    key = batch_index * call.key_batch + head * call.key_head + first_key * call.key_row
    value = batch_index * call.value_batch + head * call.value_head + first_key * call.value_row
    at = (
        batch_index * call.query_batch
        + h * call.query_head
        + (first_query + start) * call.query_row
    )
    grad_out_at = batch_index * call.grad_out_batch + h * call.grad_out_head
    grad_out_at += (first_query + start) * call.grad_out_row
    out_at = batch_index * call.out_batch + h * call.out_head + (first_query + start) * call.out_row
    query = pointer(call.query, zero) + at
    query_row = call.query_row
    grad_out = pointer(call.grad_out, zero) + grad_out_at
    grad_out_row = call.grad_out_row

    if following >= 0:
        _prefetch(call, following, _QUERY)
    _fill(d_query_t, call.head_dim * width, zero)
    _fill(ones, VECTORS * lanes, cast(1.0, zero))
    if begin < end:
        if rows < width:
            _fill(query_t, call.head_dim * width, zero)
            _fill(grad_out_t, call.value_dim * width, zero)
            _fill(lse2, width, zero)
            _fill(rest, width, zero)
            _fill(delta, width, zero)
        dead = _read_lse(call, row, rows, lse2, rest, first, last)
        # Rows that attend nothing may hold NaN, and padding is needed where a row is no whole
        # number of vectors: only then, and to widen them, are rows copied.
        if dead or call.item_type != ITEM_COMPUTED or head_columns != call.head_dim:
            copy_rows(
                *(call.item_type, call.query, at, query_row),
                *(query_rows, head_columns, rows, call.head_dim, lse2, zero),
            )
            query, query_row = query_rows, head_columns
        if dead or call.item_type != ITEM_COMPUTED or value_columns != call.value_dim:
            copy_rows(
                *(call.item_type, call.grad_out, grad_out_at, grad_out_row),
                *(grad_out_rows, value_columns, rows, call.value_dim, lse2, zero),
            )
            grad_out, grad_out_row = grad_out_rows, value_columns
        dot_rows(
            *(call.item_type, call.out, out_at, call.out_row),
            *(grad_out, grad_out_row, rows, call.value_dim, delta, zero),
        )
        _finish_delta(call, row, rows, lse2, delta, chunk == first_chunk)
        load_tile(
            *(call, rows, width, query, query_row, grad_out, grad_out_row, query_t, grad_out_t)
        )
    if following >= 0:
        _prefetch(call, following, _OUT)
    tile = (rows, width, query, query_row, grad_out, grad_out_row)

    blocks = 0
    k0 = begin
    while k0 < end:
        keys = block_end(k0, end) - k0
        if attends_none(call, b, h, start, rows, k0, keys):
            k0 += keys
            continue
        key_at, value_at = key + k0 * call.key_row, value + k0 * call.value_row
        score_products(
            *(call, vectors, keys, key_at, value_at, query_t, grad_out_t),
            *(scores, d_weights, width, key_rows),
        )
        if following >= 0 and blocks == 0:
            _prefetch(call, following, _KEY)
        if call.cap != 0.0:
            cap_scores(cast(call.cap, zero), scores, slopes, keys * width)
        if has_terms(call):
            add_terms(call, b, h, start, rows, width, k0, keys, scores, terms)
        masked = k0 < common_first or k0 + keys - 1 > common_last
        gradient_block(
            *(call, b, h, start, masked, k0, keys, width, scores, d_weights),
            *(lse2, rest, delta, first, last),
        )
        if following >= 0 and blocks == 0:
            _prefetch(call, following, _VALUE)
        if call.d_bias != 0:
            store_bias_gradient(call, b, h, start, k0, rows, width, keys, d_weights, terms)
        if call.cap != 0.0:
            for at in range(0, keys * width, lanes):
                store(d_weights + at, load(d_weights + at) * load(slopes + at))
        part, alone = d_query_t, call.chunk_tasks == 1
        if not alone:
            part = parts + blocks * call.head_dim * width
        done = k0 - chunk_begin
        sums = (
            *(d_key + done * head_columns, head_columns),
            *(d_value + done * value_columns, value_columns),
        )
        add_products(
            *(call, vectors, keys, tile, scores, d_weights, terms, ones),
            *(key_at, key_rows, sums, part, alone),
        )
        if following >= 0 and blocks == 0:
            _prefetch(call, following, _GRAD_OUT)
        blocks += 1
        k0 += keys

    if call.chunk_tasks > 1:
        before, ends = chunk - first_chunk, chunk == last_chunk
        d_query_t = _accumulate_dq(call, b, h, start, before, ends, parts, blocks, width)
        if not ends:
            return
    _store_query_gradient(
        call, batch_index, h, first_query + start, d_query_t, width, rows, query_rows
    )


@jit
def _backward_chunk(call, b, head, chunk, following, scratch):
    """One chunk of a head of K and V, with every query of every query head that shares it."""
    zero = call.zero
    lanes = lanes_of(zero)
    batch_index, _, first_key, query_len, key_len = sequence_of(call, b)
    begin = chunk * call.chunk_keys
    keys = max(0, min(call.chunk_keys, key_len - begin))
    if keys == 0 and chunk > 0:
        return
    head_columns = (call.head_dim + lanes - 1) // lanes * lanes
    value_columns = (call.value_dim + lanes - 1) // lanes * lanes
    d_key = scratch
    d_value = d_key + keys * head_columns
    tile_scratch = d_value + keys * value_columns
    _fill(d_key, keys * (head_columns + value_columns), zero)
    groups = call.heads // call.key_heads
    for h in range(head * groups, (head + 1) * groups):
        for tile in range((query_len + call.tile - 1) // call.tile - 1, -1, -1):
            is_last = tile == 0 and h == (head + 1) * groups - 1
            after = following if is_last else -1
            _backward_tile(call, b, h, tile * call.tile, chunk, after, tile_scratch, d_key, d_value)
    to_key = batch_index * call.d_key_batch + head * call.d_key_head
    write_rows(
        *(
            call.item_type,
            call.d_key,
            to_key + (first_key + begin) * call.d_key_row,
            call.d_key_row,
        ),
        *(d_key, head_columns, keys, call.head_dim, cast(call.score_scale, zero)),
    )
    to_value = batch_index * call.d_value_batch + head * call.d_value_head
    to_value += (first_key + begin) * call.d_value_row
    write_rows(
        *(call.item_type, call.d_value, to_value, call.d_value_row),
        *(d_value, value_columns, keys, call.value_dim, cast(1.0, zero)),
    )


def backward(argument):
    """All heads of K and V; a task is one, one chunk of it, or all that share a bias gradient."""
    call = read(argument)
    zero = call.zero
    counters = integers_at(call.work_counter)
    scratch = pointer(call.scratch, zero) + (
        take_work(counters + 1) * call.scratch_bytes // item_size(zero)
    )
    tasks = call.batch_tasks * call.head_tasks * call.chunk_tasks
    while True:
        first = take_work(counters) * call.tasks_per_grab
        if first >= tasks:
            break
        for task in range(first, min(first + call.tasks_per_grab, tasks)):
            following = -1
            if task + 1 < min(first + call.tasks_per_grab, tasks):  # tasks are heads where several
                following = task + 1
            plane, chunk = task // call.chunk_tasks, task % call.chunk_tasks
            b, head = plane // call.head_tasks, plane % call.head_tasks
            b_end = b + 1 if call.batch_tasks == call.batch else call.batch
            head_end = head + 1 if call.head_tasks == call.key_heads else call.key_heads
            for each_b in range(b, b_end):
                for each_head in range(head, head_end):
                    _backward_chunk(call, each_b, each_head, chunk, following, scratch)


BACKWARD = Kernel(backward, ATTENTION.fields("backward"))


def scratch_elements(
    width: int,
    lanes: int,
    chunk_keys: int,
    head_dim: int,
    value_dim: int,
    half: bool,
    softcap: bool,
    chunked: bool,
) -> int:
    """Elements of scratch that a thread of `BACKWARD` needs for tiles of `width` queries."""
    head, value = (-(-columns // lanes) * lanes for columns in (head_dim, value_dim))
    blocks = 3 + softcap
    tile = width * (2 * head_dim + value_dim + blocks * BLOCK_KEYS + head + value + 5)
    tile += VECTORS * lanes
    parts = chunk_keys // BLOCK_KEYS * head_dim * width if chunked else 0
    widened = BLOCK_KEYS * (head_dim + value_dim + lanes) if half else 0
    return tile + parts + widened + chunk_keys * (head + value)
