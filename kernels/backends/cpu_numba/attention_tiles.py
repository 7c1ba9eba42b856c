"""What the attention kernels share: sequences, key ranges, what changes scores, dropout.

A tile is up to `call.tile` queries of one head, one query a lane; its matrices are kept transposed,
a key (or a column of the head) a row, `width` elements a row. Scores are in base 2: score * log2 e.
"""

from __future__ import annotations

import math

from ..cpu_common.constants import BLOCK_KEYS, ITEM_BFLOAT16, ITEM_FLOAT16, LOG2_E
from .attention_rows import prefetch_rows, readable
from .gemm import TILE_VECTORS, lanes_of
from .jit import jit
from .memory import (
    as_integers32,
    bfloat16_at,
    bytes_at,
    float16_at,
    integers_at,
    load,
    load_first,
    load_first_flags,
    pointer,
    store,
)
from .philox import at_least, philox
from .transpose import add_to_scores
from .vector import (
    cast,
    lane_floats,
    lane_numbers,
    maximum,
    multiply_add,
    select,
    splat,
    splat_integer,
)
from .vector_math import tanh


@jit
def sequence_of(call, b):
    """Where batch element b lies: (index in memory, first query, first key, Lq, Lk)."""
    batch_index, first_query, first_key = b, 0, 0
    query_len, key_len = call.query_len, call.key_len
    if call.query_starts != 0:
        queries, keys = integers_at(call.query_starts) + b, integers_at(call.key_starts) + b
        batch_index, first_query, first_key = 0, queries[0], keys[0]
        query_len, key_len = queries[1] - queries[0], keys[1] - keys[0]
    return batch_index, first_query, first_key, query_len, key_len


@jit
def tile_vectors(rows, like):
    """Vectors that hold `rows` queries, one a lane."""
    lanes = lanes_of(like)
    return min(TILE_VECTORS, (rows + lanes - 1) // lanes)


@jit
def limits(call, b, query_len, key_len):
    """Of batch element b: lower and upper bound of j - i, how many queries and keys count, and how
    many of these have no upper bound."""
    lower, upper = call.band_lower, call.band_upper
    if call.band != 0:
        band = integers_at(call.band) + 2 * b
        lower, upper = max(lower, band[0]), min(upper, band[1])
    keys, queries = key_len, query_len
    if call.key_lengths != 0:
        keys = min(keys, integers_at(call.key_lengths)[b])
    if call.query_lengths != 0:
        queries = min(queries, integers_at(call.query_lengths)[b])
    prefix = 0
    if call.prefix_lengths != 0:
        prefix = max(0, integers_at(call.prefix_lengths)[b])
    return lower, upper, queries, keys, prefix


@jit
def lowest_key(i, lower):
    return max(0, i + lower)


@jit
def highest_key(i, upper, keys, prefix):
    return min(keys - 1, max(i + upper, prefix - 1))


@jit
def key_ranges(call, b, start, rows, width, query_len, key_len, first, last):
    """The keys first[r] to last[r] that each query of the tile may attend by band and lengths.

    Returns (begin, end, common_first, common_last): keys begin <= j < end are attended by some
    query, those from common_first to common_last by all. Lanes past the last row attend anything
    (their results are not used); a query that may attend nothing has last = -1.
    """
    lower, upper, queries, keys, prefix = limits(call, b, query_len, key_len)
    begin, end, common_first, common_last = key_len, 0, 0, key_len - 1
    firsts, lasts = as_integers32(first), as_integers32(last)
    last_row = start + rows - 1
    full = lowest_key(last_row, lower) == 0
    full = full and highest_key(start, upper, keys, prefix) == keys - 1
    if full and last_row < queries and keys > 0:
        # every query may attend every key that counts
        for r in range(width):
            firsts[r] = 0
            lasts[r] = keys - 1
        return 0, keys, 0, keys - 1
    for r in range(width):
        i = start + r
        low, high = lowest_key(i, lower), highest_key(i, upper, keys, prefix)
        if r >= rows:
            low, high = 0, key_len
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
def block_end(k0, end):
    """Where the block of keys that k0 lies in ends. The blocks of a head do not depend on where a
    tile begins, so neither does the order of its sums."""
    return min(end, (k0 // BLOCK_KEYS + 1) * BLOCK_KEYS)


@jit
def in_range(k, low, high, like):
    """Which lanes may attend key k, from their ranges."""
    key = splat_integer(k, like)
    return (low <= key) & (key <= high)


# --- scores ---------------------------------------------------------------------------------------


@jit
def cap_scores(cap, scores, slopes, elements):
    """scores = cap * tanh(scores), and tanh's derivative in `slopes`."""
    one = splat(cast(1.0, cap))
    caps = splat(cap)
    for at in range(0, elements, lanes_of(scores)):
        capped = tanh(load(scores + at))
        store(slopes + at, one - capped * capped)
        store(scores + at, capped * caps)


@jit
def _same_document(call, b, start, rows, k0, keys):
    """(whether any, whether every) query of the tile may attend a key of the block, at most."""
    queries = integers_at(call.query_documents) + (b * call.query_documents_batch + start)
    ids = integers_at(call.key_documents) + (b * call.key_documents_batch + k0)
    low, high = queries[0], queries[0]
    for r in range(1, rows):
        low, high = min(low, queries[r]), max(high, queries[r])
    met, every = False, low == high
    for k in range(keys):
        met = met or (low <= ids[k] and ids[k] <= high)
        every = every and ids[k] == low
    return met, every


@jit
def attends_none(call, b, h, start, rows, k0, keys):
    """Whether dense mask or documents forbid a block, which then is neither read nor computed."""
    if call.query_documents != 0 and not _same_document(call, b, start, rows, k0, keys)[0]:
        return True
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
def has_terms(call):
    """Whether anything but the band and the lengths changes scores one by one."""
    return call.bias != 0 or call.dense != 0 or call.alibi != 0 or call.query_documents != 0


@jit
def _add_pair(scores, at, added, nothing):
    """scores += added; -inf wherever `added` is, even over NaN."""
    total = load(scores + at) + added
    store(scores + at, select(added == nothing, nothing, total))


@jit
def _copy_block(source, row, rows, columns, block, zero):
    """The upper left of a LANES x LANES block; zeros in the rest."""
    lanes = lanes_of(block)
    for r in range(lanes):
        if r < rows:
            store(block + r * lanes, load_first(source + r * row, columns))
        else:
            store(block + r * lanes, splat(zero))


@jit
def _add_part(source, row, rows, columns, allowed, allowed_row, dense, target, width, block, zero):
    """scores^T += log2(e) * bias for rows x columns pairs, and -inf where they are forbidden."""
    lanes = lanes_of(target)
    factor = cast(LOG2_E, zero)
    if not dense and rows == lanes and columns == lanes:
        add_to_scores(source, row, target, width, factor)
        return
    _copy_block(source, row, rows, columns, block, zero)
    if dense:
        nothing = splat(cast(-math.inf, zero))
        for r in range(rows):
            at = block + r * lanes
            flags = load_first_flags(allowed + r * allowed_row, zero, columns)
            store(at, select(flags, load(at), nothing))
    add_to_scores(block, lanes, target, width, factor)


@jit
def prefetch_block(item_type, address, offset, row, rows, keys, zero):
    """Ask for the block after the one at `offset`, up to the end of the rows' `keys` left here.

    A block is short pieces of many rows, which the hardware does not foresee.
    """
    columns = min(BLOCK_KEYS, keys - BLOCK_KEYS)
    if columns > 0:
        prefetch_rows(item_type, address, offset + BLOCK_KEYS, row, rows, columns, zero)


@jit
def _add_matrix(call, b, h, start, rows, width, k0, keys, scores, block, bias, dense):
    """What differs from pair to pair: log2(e) * bias, and -inf where the dense mask forbids.

    It lies in memory a query a row, and is turned over LANES x LANES at a time. Keys past the last
    of a block get something too, which is not used.
    """
    lanes = lanes_of(scores)
    zero = call.zero
    row, item_type, address = call.bias_row, call.bias_item_type, call.bias
    bias_at = b * call.bias_batch + h * call.bias_head + start * row + k0
    allowed = bytes_at(call.dense) + (b * call.dense_batch + h * call.dense_head)
    allowed = allowed + (start * call.dense_row + k0)
    if bias:
        prefetch_block(item_type, address, bias_at, row, rows, call.key_len - k0, zero)
    for v in range(0, width, lanes):
        for k in range(0, keys, lanes):
            at, target = bias_at + v * row + k, scores + (k * width + v)
            part = (min(lanes, rows - v), min(lanes, keys - k))
            flags = (allowed + (v * call.dense_row + k), call.dense_row, dense)
            to = (target, width, block, zero)
            if not bias:
                _copy_block(target, 0, 0, 0, block, zero)
                _add_part(block, lanes, *part, *flags, *to)
            elif item_type == ITEM_BFLOAT16:
                _add_part(bfloat16_at(address, zero) + at, row, *part, *flags, *to)
            elif item_type == ITEM_FLOAT16:
                _add_part(float16_at(address, zero) + at, row, *part, *flags, *to)
            else:
                _add_part(pointer(address, zero) + at, row, *part, *flags, *to)


@jit
def _add_bias(call, b, h, start, rows, width, k0, keys, scores, scratch):
    """log2(e) * a bias that is the same for all queries or for all keys."""
    lanes = lanes_of(scores)
    zero = call.zero
    factor = cast(LOG2_E, zero)
    nothing = splat(cast(-math.inf, zero))
    offset = b * call.bias_batch + h * call.bias_head
    offset += start * call.bias_row + k0 * call.bias_column
    by_row = call.bias_row != 0
    some_rows = rows if by_row else 1
    columns = 1 if call.bias_column == 0 else keys
    source, row = readable(
        *(call.bias_item_type, call.bias, offset, call.bias_row, some_rows, columns, scratch, zero)
    )
    if not by_row:
        for k in range(keys):
            same = splat(source[k * call.bias_column] * factor)
            for v in range(0, width, lanes):
                _add_pair(scores, k * width + v, same, nothing)
        return
    of_rows = scratch + rows
    for r in range(width):
        of_rows[r] = source[r * row] * factor if r < rows else zero
    for k in range(keys):
        for v in range(0, width, lanes):
            _add_pair(scores, k * width + v, load(of_rows + v), nothing)


@jit
def _subtract_decay(call, b, h, start, width, k0, keys, scores):
    """scores -= log2(e) * slope * |i + offset - j| (ALiBi)."""
    zero = call.zero
    slope = pointer(call.alibi, 0.0)[b * call.alibi_batch + h]
    offset = integers_at(call.alibi_offset)[b * call.alibi_offset_batch]
    decay = splat(cast(-LOG2_E * slope, zero))
    nothing = splat(cast(0.0, zero))
    for v in range(0, width, lanes_of(scores)):
        for k in range(keys):
            first = splat(cast(float(start + v + offset - (k0 + k)), zero))
            distance = first + lane_floats(zero)
            distance = maximum(distance, nothing - distance)
            at = scores + (k * width + v)
            store(at, multiply_add(distance, decay, load(at)))


@jit
def _forbid(call, b, h, start, rows, width, k0, keys, scores):
    """scores = -inf where documents, or a dense mask that is no matrix, forbid a pair."""
    minus_infinity = cast(-math.inf, call.zero)
    if call.dense != 0 and not _dense_is_matrix(call):
        allowed = bytes_at(call.dense) + (b * call.dense_batch + h * call.dense_head)
        allowed = allowed + (start * call.dense_row + k0 * call.dense_column)
        for k in range(keys):
            if call.dense_row == 0:
                if allowed[k * call.dense_column] == 0:
                    for v in range(0, width, lanes_of(scores)):
                        store(scores + (k * width + v), splat(minus_infinity))
            else:
                for r in range(rows):
                    if allowed[r * call.dense_row + k * call.dense_column] == 0:
                        scores[k * width + r] = minus_infinity
    if call.query_documents != 0 and not _same_document(call, b, start, rows, k0, keys)[1]:
        queries = integers_at(call.query_documents) + (b * call.query_documents_batch + start)
        ids = integers_at(call.key_documents) + (b * call.key_documents_batch + k0)
        for k in range(keys):
            for r in range(rows):
                if queries[r] != ids[k]:
                    scores[k * width + r] = minus_infinity


@jit
def _dense_is_matrix(call):
    return call.dense_row != 0 and call.dense_column == 1


@jit
def add_terms(call, b, h, start, rows, width, k0, keys, scores, scratch):
    """scores += log2(e) * (bias + ALiBi), and -inf where bias, dense mask or documents say so.

    `scores` is (keys, width), and so is `scratch`.
    """
    if call.alibi != 0:
        _subtract_decay(call, b, h, start, width, k0, keys, scores)
    bias_is_matrix = call.bias != 0 and call.bias_row != 0 and call.bias_column == 1
    dense_is_matrix = call.dense != 0 and _dense_is_matrix(call)
    if call.bias != 0 and not bias_is_matrix:
        _add_bias(call, b, h, start, rows, width, k0, keys, scores, scratch)
    if bias_is_matrix or dense_is_matrix:
        _add_matrix(
            *(call, b, h, start, rows, width, k0, keys, scores, scratch),
            *(bias_is_matrix, dense_is_matrix),
        )
    _forbid(call, b, h, start, rows, width, k0, keys, scores)


# --- dropout --------------------------------------------------------------------------------------


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
            if 0 <= k + 3 < keys:
                drop(weights + ((k + 3) * width + v), w3, call.threshold, zeros)
