"""What the forward and the backward kernel share: a tile's key ranges, its bias, its dropout.

A tile is up to VECTORS * LANES queries of one head, one query a lane; its matrices are kept
transposed, a key (or a column of the head) a row, `width` elements a row.
"""

from __future__ import annotations

import math

from .elementwise import at_least, philox
from .jit import jit
from .microkernel import VECTORS, lanes_of, transpose
from .simd import (
    as_integers32,
    bytes_at,
    cast,
    integers_at,
    lane_numbers,
    load,
    pointer,
    select,
    splat,
    splat_integer,
    store,
)

BLOCK_KEYS = 128  # keys whose scores are in the scratch at once
NO_BOUND = 2**40  # a band bound that no position reaches
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# Fields of both kernels' records: addresses, strides in elements (of the dense mask: in bytes) and
# sizes. An absent tensor has address 0; a broadcast dimension has stride 0.
INTEGERS = (
    *("query", "query_batch", "query_head", "query_row"),  # (B, Hq, Lq, D)
    *("key", "key_batch", "key_head", "key_row"),  # (B, Hkv, Lk, D)
    *("value", "value_batch", "value_head", "value_row"),  # (B, Hkv, Lk, Dv)
    *("out", "out_batch", "out_head", "out_row"),  # (B, Hq, Lq, Dv)
    "lse",  # (B, Hq, Lq) float64, contiguous
    *("batch", "heads", "key_heads", "query_len", "key_len", "head_dim", "value_dim"),
    *("band_lower", "band_upper", "band"),  # bounds on j - i; band (B, 2) int64
    *("key_lengths", "query_lengths"),  # (B,) int64
    *("bias", "bias_batch", "bias_head", "bias_row", "bias_column"),  # (B, Hq, Lq, Lk)
    *("dense", "dense_batch", "dense_head", "dense_row", "dense_column"),  # (B, Hq, Lq, Lk) bool
    *("dropout", "threshold", "seed", "batch_start"),  # 0 or 1; words below threshold drop
)
REALS = ("scale", "keep_scale")


@jit
def tile_vectors(rows, like):
    """Vectors that hold `rows` queries, one a lane."""
    lanes = lanes_of(like)
    return min(VECTORS, (rows + lanes - 1) // lanes)


@jit
def key_ranges(call, b, start, rows, width, first, last):
    """The keys first[r] to last[r] that each query of the tile may attend by band and lengths.

    Returns (begin, end, common_first, common_last): keys begin <= j < end are attended by some
    query, those from common_first to common_last by all. Lanes past the last row attend anything
    (their results are not used); a query that may attend nothing has last = -1.
    """
    lower, upper = call.band_lower, call.band_upper
    if call.band != 0:
        band = integers_at(call.band) + 2 * b
        lower, upper = max(lower, band[0]), min(upper, band[1])
    keys, queries = call.key_len, call.query_len
    if call.key_lengths != 0:
        keys = min(keys, integers_at(call.key_lengths)[b])
    if call.query_lengths != 0:
        queries = min(queries, integers_at(call.query_lengths)[b])
    begin, end, common_first, common_last = call.key_len, 0, 0, call.key_len - 1
    firsts, lasts = as_integers32(first), as_integers32(last)
    for r in range(width):
        i = start + r
        low, high = max(0, i + lower), min(keys - 1, i + upper)
        if r >= rows:
            low, high = 0, call.key_len
        elif i >= queries or low > high:
            low, high = 0, -1
            common_last = -1
        else:
            begin, end = min(begin, low), max(end, high + 1)
            common_first, common_last = max(common_first, low), min(common_last, high)
        firsts[r] = low
        lasts[r] = high
    return begin, end, common_first, common_last


@jit
def in_range(k, low, high, like):
    """Which lanes may attend key k, from their ranges."""
    key = splat_integer(k, like)
    return (low <= key) & (key <= high)


@jit
def attends_none(call, b, h, start, rows, k0, keys):
    """Whether the dense mask forbids a whole block, which then is neither read nor computed."""
    if call.dense == 0:
        return False
    allowed = bytes_at(call.dense) + (b * call.dense_batch + h * call.dense_head)
    allowed = allowed + (start * call.dense_row + k0 * call.dense_column)
    for r in range(1 if call.dense_row == 0 else rows):
        row = allowed + r * call.dense_row
        seen = row[0] & 0
        for k in range(1 if call.dense_column == 0 else keys):
            seen |= row[k * call.dense_column]
        if seen != 0:
            return False
    return True


@jit
def add_bias(call, b, h, start, rows, width, k0, keys, scores, bias):
    """scores += log2(e) * bias, and -inf where the bias or the dense mask says so.

    `scores` and `bias` are (keys, width); `bias` is scratch.
    """
    lanes = lanes_of(scores)
    zero = call.zero
    factor = cast(LOG2_E, zero)
    minus_infinity = cast(-math.inf, zero)
    if call.bias != 0:
        source = pointer(call.bias, zero) + (b * call.bias_batch + h * call.bias_head)
        source = source + (start * call.bias_row + k0 * call.bias_column)
        if call.bias_row == 0:
            for k in range(keys):
                same = splat(source[k * call.bias_column] * factor)
                for v in range(0, width, lanes):
                    store(bias + (k * width + v), same)
        elif call.bias_column == 1:
            transpose(source, call.bias_row, bias, width, rows, keys, factor)
        else:
            for k in range(keys):
                for r in range(rows):
                    bias[k * width + r] = source[r * call.bias_row + k * call.bias_column] * factor
    else:
        for k in range(keys):
            for v in range(0, width, lanes):
                store(bias + (k * width + v), splat(cast(0.0, zero)))
    if call.dense != 0:
        allowed = bytes_at(call.dense) + (b * call.dense_batch + h * call.dense_head)
        allowed = allowed + (start * call.dense_row + k0 * call.dense_column)
        for k in range(keys):
            if call.dense_row == 0:
                if allowed[k * call.dense_column] == 0:
                    for v in range(0, width, lanes):
                        store(bias + (k * width + v), splat(minus_infinity))
            else:
                for r in range(rows):
                    if allowed[r * call.dense_row + k * call.dense_column] == 0:
                        bias[k * width + r] = minus_infinity
    nothing = splat(minus_infinity)
    for at in range(0, keys * width, lanes):
        added = load(bias + at)
        store(scores + at, select(added == nothing, nothing, load(scores + at) + added))


@jit
def random_words(call, b, h, start, v, group):
    """Four vectors of words for keys 4 * group to 4 * group + 3 and the lanes from `v` on."""
    queries = lane_numbers(call.zero) + splat_integer(start + v, call.zero)
    return philox(group, queries, h, b + call.batch_start, call.seed, call.zero)


@jit
def drop(row, words, threshold, zeros):
    """Zero the elements of one vector of weights that dropout drops."""
    store(row, select(at_least(words, threshold), load(row), zeros))


@jit
def drop_weights(call, b, h, start, width, k0, keys, weights):
    """Zero the dropped weights of a (keys, width) block; the kept ones are scaled at the end."""
    lanes = lanes_of(weights)
    zeros = splat(call.zero)
    for v in range(0, width, lanes):
        for group in range(k0 // 4, (k0 + keys + 3) // 4):
            w0, w1, w2, w3 = random_words(call, b, h, start, v, group)
            k = 4 * group - k0
            if k >= 0:
                drop(weights + (k * width + v), w0, call.threshold, zeros)
            if 0 <= k + 1 < keys:
                drop(weights + ((k + 1) * width + v), w1, call.threshold, zeros)
            if 0 <= k + 2 < keys:
                drop(weights + ((k + 2) * width + v), w2, call.threshold, zeros)
            if k + 3 < keys:
                drop(weights + ((k + 3) * width + v), w3, call.threshold, zeros)
