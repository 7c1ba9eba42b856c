"""The two products of the attention forward, S^T = K Q^T and O^T += V^T P^T, in two ways.

Half types are widened and multiplied in float32; bfloat16, where the host has instructions for it,
is multiplied as it is (`gemm_bfloat16`). Which way is settled when the kernel is compiled, by the
type of the record's `item`: a launch that names bfloat16 asks for the second.

Both ways keep matrices transposed, `width` queries a row. The second has Q^T and P^T in pairs:
half as many rows, of words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.extending import overload

from ..cpu_common.constants import BLOCK_KEYS, ITEM_COMPUTED
from .attention_rows import readable, write_rows
from .attention_tiles import block_end
from .gemm import lanes_of, multiply, multiply_columns
from .gemm_bfloat16 import (
    PAIRED,
    as_bfloat16,
    load_first_paired,
    load_paired,
    multiply_pairs,
    store_first_paired,
    store_interleaved,
    store_paired,
    store_rounded,
    transpose_words,
)
from .jit import OVERLOAD_OPTIONS, jit
from .memory import bfloat16_at, load, pointer, store
from .transpose import transpose
from .vector import BFLOAT16, cast, select, splat


def either(floats: Callable[..., None], pairs: Callable[..., None]) -> Callable[..., Any]:
    """Compiles what it decorates as one of the two, by the record `call`, the first argument."""

    def declare(step: Callable[..., None]) -> Callable[..., None]:
        overload(step, jit_options=OVERLOAD_OPTIONS, strict=False)(
            lambda call, *_: pairs if call.typeof("item") == BFLOAT16 else floats
        )
        return step

    return declare


# --- Q^T ------------------------------------------------------------------------------------------


def _query_in_floats(call, offset, rows, width, query_t, scratch, spare):
    """Scaled by call.scale, so that the scores need not be."""
    zero = call.zero
    if rows < width:
        for at in range(0, call.head_dim * width, lanes_of(zero)):
            store(query_t + at, splat(zero))
    query, row = readable(
        call.item_type, call.query, offset, call.query_row, rows, call.head_dim, scratch, zero
    )
    transpose(query, row, query_t, width, rows, call.head_dim, cast(call.scale, zero))


def _query_in_pairs(call, offset, rows, width, query_t, scratch, spare):
    """Not scaled, which would round it once more."""
    lanes = lanes_of(query_t)
    block, words = as_bfloat16(spare), as_bfloat16(query_t)
    query = bfloat16_at(call.query, call.zero) + offset
    for r in range(0, width, lanes):
        for c in range(0, call.head_dim, PAIRED):
            to = words + (c * width + 2 * r)
            if r + lanes <= rows and c + PAIRED <= call.head_dim:
                transpose_words(query + (r * call.query_row + c), call.query_row, to, 2 * width)
            else:
                for n in range(lanes):
                    count = call.head_dim - c if r + n < rows else 0
                    at = query + ((r + n) * call.query_row + c)
                    store_paired(spare + n * lanes, load_first_paired(at, count))
                transpose_words(block, PAIRED, to, 2 * width)


@either(_query_in_floats, _query_in_pairs)
def load_query(call, offset, rows, width, query_t, scratch, spare):
    """Q^T of `rows` queries from element `offset` of q on; lanes past the last hold zeros."""
    raise NotImplementedError


# --- S^T = K Q^T ----------------------------------------------------------------------------------


@jit
def wide_block(call, wide, k0, key_len):
    """Where the block of key k0 is kept widened, (its K, its V), whether it is there already, its
    keys before k0, and all of them. From now on it is there.

    `wide` is scratch: a number for each block of the head, then K and V, (key_len, D | Dv).
    """
    if call.keeps_wide == 0:
        return wide, wide, True, k0 % BLOCK_KEYS, 0
    first = k0 // BLOCK_KEYS * BLOCK_KEYS
    done = wide[k0 // BLOCK_KEYS] != call.zero
    wide[k0 // BLOCK_KEYS] = cast(1.0, call.zero)
    key = wide + (call.key_len + BLOCK_KEYS - 1) // BLOCK_KEYS
    value = key + (call.key_len * call.head_dim + first * call.value_dim)
    return key + first * call.head_dim, value, done, k0 - first, block_end(first, key_len) - first


@jit
def _readable_keys(call, address, offset, row, columns, keys, place, block, scratch):
    """Rows of K or V from `offset` on as (pointer, row stride), in the block kept at `place`."""
    if call.keeps_wide == 0:
        return readable(call.item_type, address, offset, row, keys, columns, scratch, call.zero)
    _, _, done, before, whole = block
    if not done:
        start = offset - before * row
        readable(call.item_type, address, start, row, whole, columns, place, call.zero)
    return place + before * columns, columns


def _scores_in_floats(call, vectors, keys, offset, query_t, scores, width, scratch, block):
    key, row = _readable_keys(
        call, call.key, offset, call.key_row, call.head_dim, keys, block[0], block, scratch
    )
    multiply(vectors, keys, call.head_dim, (key, row, 1), (query_t, width), (scores, width), False)


@jit
def even_rows(source, row, rows, columns, target):
    """Rows with zeros behind an odd last element, as (pointer, row stride)."""
    even_row = (columns + PAIRED - 1) // PAIRED * PAIRED
    lanes = lanes_of(target)
    for r in range(rows):
        for c in range(0, columns, PAIRED):
            elements = load_first_paired(source + (r * row + c), columns - c)
            store_paired(target + (r * (even_row // 2) + c // PAIRED * lanes), elements)
    return as_bfloat16(target), even_row


def _scores_in_pairs(call, vectors, keys, offset, query_t, scores, width, scratch, block):
    key, row = bfloat16_at(call.key, call.zero) + offset, call.key_row
    if call.head_dim % 2 != 0:
        key, row = even_rows(key, row, keys, call.head_dim, scratch)
    pairs, scale = (call.head_dim + 1) // 2, cast(call.scale, call.zero)
    left, right, result = (key, row, 2), (query_t, width), (scores, width)
    multiply_pairs(vectors, keys, pairs, left, right, result, False, scores, scale)


@either(_scores_in_floats, _scores_in_pairs)
def score_product(call, vectors, keys, offset, query_t, scores, width, scratch, block):
    """scores = call.scale * K Q^T of `keys` keys from element `offset` of k on; `block` is
    `wide_block`'s."""
    raise NotImplementedError


# --- O^T += V^T P^T -------------------------------------------------------------------------------


@jit
def _scale_columns(matrix, rows, width, factors):
    """matrix[r, :] *= factors[:] for a (rows, width) matrix."""
    lanes = lanes_of(matrix)
    for v in range(0, width, lanes):
        factor = load(factors + v)
        for r in range(rows):
            at = matrix + (r * width + v)
            store(at, load(at) * factor)


def _values_in_floats(
    call, vectors, keys, offset, weights, out_t, rescale, moved, started, width, scratch, block
):
    if moved and started:
        _scale_columns(out_t, call.value_dim, width, rescale)
    value, row = _readable_keys(
        call, call.value, offset, call.value_row, call.value_dim, keys, block[1], block, scratch
    )
    left, right, result = (value, 1, row), (weights, width), (out_t, width)
    before = block[3]
    multiply_columns(vectors, call.value_dim, before, keys, left, right, result, started)


@jit
def round_pairs(matrix, rows, width, zeros):
    """A matrix in pairs, in place: the words of rows 2r and 2r + 1 become row r."""
    lanes = lanes_of(matrix)
    for r in range(0, rows, 2):
        row, words = matrix + r * width, matrix + r // 2 * width
        for v in range(0, width, lanes):
            first = load(row + v)
            second = load(row + (width + v)) if r + 1 < rows else zeros
            store_rounded(words + v, first, second)


@jit
def interleave_rows(source, row, rows, columns, target):
    """Rows 2k and 2k + 1 as one row of pairs; returns how many words such a row takes."""
    whole = columns - columns % PAIRED
    words = (columns + PAIRED - 1) // PAIRED * PAIRED
    for r in range(0, rows, 2):
        first, to = source + r * row, target + r // 2 * words
        second = first + row if r + 1 < rows else first
        if r + 1 < rows:
            for c in range(0, whole, PAIRED):
                store_interleaved(to + c, load_paired(first + c), load_paired(second + c))
        for c in range(whole if r + 1 < rows else 0, columns, PAIRED):
            store_interleaved(
                to + c,
                load_first_paired(first + c, columns - c),
                load_first_paired(second + c, columns - c if r + 1 < rows else 0),
            )
    return words


def _values_in_pairs(
    call, vectors, keys, offset, weights, out_t, rescale, moved, started, width, scratch, block
):
    zero = call.zero
    value = bfloat16_at(call.value, zero) + offset
    words = interleave_rows(value, call.value_row, keys, call.value_dim, scratch)
    round_pairs(weights, keys, width, splat(zero))
    left, right, result = (as_bfloat16(scratch), 2, 2 * words), (weights, width), (out_t, width)
    dim, pairs, one = call.value_dim, (keys + 1) // 2, cast(1.0, zero)
    multiply_pairs(vectors, dim, pairs, left, right, result, started, rescale, one)


@either(_values_in_floats, _values_in_pairs)
def value_product(
    call, vectors, keys, offset, weights, out_t, rescale, moved, started, width, scratch, block
):
    """O^T = V^T P^T + (O^T * rescale if started) of `keys` keys from element `offset` of v on.

    Unless `moved`, all of `rescale` is 1. The weights are not kept.
    """
    raise NotImplementedError


# --- out ------------------------------------------------------------------------------------------


def _out_in_floats(call, offset, rows, width, out_t, factors, scratch):
    zero = call.zero
    lanes = lanes_of(out_t)
    zeros, one = splat(zero), cast(1.0, zero)
    for v in range(0, width, lanes):
        factor = load(factors + v)
        empty = factor == zeros
        for d in range(call.value_dim):
            at = out_t + (d * width + v)
            store(at, select(empty, zeros, load(at) * factor))
    item_type, row, dim = call.item_type, call.out_row, call.value_dim
    if item_type == ITEM_COMPUTED:
        transpose(out_t, width, pointer(call.out, zero) + offset, row, dim, rows, one)
    else:
        columns = (dim + lanes - 1) // lanes * lanes
        transpose(out_t, width, scratch, columns, dim, rows, one)
        write_rows(item_type, call.out, offset, row, scratch, columns, rows, dim, one)


def _out_in_pairs(call, offset, rows, width, out_t, factors, scratch):
    zero = call.zero
    lanes = lanes_of(out_t)
    zeros = splat(zero)
    for v in range(0, width, lanes):
        factor = load(factors + v)
        empty = factor == zeros
        for d in range(0, call.value_dim, 2):
            row = out_t + (d * width + v)
            first = select(empty, zeros, load(row) * factor)
            second = zeros
            if d + 1 < call.value_dim:
                second = select(empty, zeros, load(row + width) * factor)
            store_rounded(out_t + (d // 2 * width + v), first, second)
    out = bfloat16_at(call.out, zero) + offset
    block = as_bfloat16(scratch)
    for r in range(0, rows, lanes):
        for c in range(0, call.value_dim, PAIRED):
            words = as_bfloat16(out_t + (c // 2 * width + r))
            to = out + (r * call.out_row + c)
            if r + lanes <= rows and c + PAIRED <= call.value_dim:
                transpose_words(words, 2 * width, to, call.out_row)
            else:
                transpose_words(words, 2 * width, block, PAIRED)
                for n in range(min(lanes, rows - r)):
                    row = load_paired(block + n * PAIRED)
                    store_first_paired(to + n * call.out_row, row, call.value_dim - c)


@either(_out_in_floats, _out_in_pairs)
def write_out(call, offset, rows, width, out_t, factors, scratch):
    """out = O * factors of `rows` queries from element `offset` on; 0 where the factor is 0, for
    there O may be NaN."""
    raise NotImplementedError
