"""What the attention kernels share: sequences, key ranges, what changes scores, dropout.

A tile is up to `call.tile` queries of one head, one query a lane; its matrices are kept transposed,
a key (or a column of the head) a row, `width` elements a row. Scores are in base 2: score * log2 e.
"""

from __future__ import annotations

import math

from ..cpu_constants import BLOCK_KEYS, LOG2_E
from .attention_rows import readable
from .elementwise import at_least, philox, tanh
from .jit import jit
from .memory import as_integers32, bytes_at, integers_at, load, pointer, store
from .microkernel import VECTORS, lanes_of, transpose
from .simd import (
    cast,
    lane_floats,
    lane_numbers,
    maximum,
    multiply_add,
    select,
    splat,
    splat_integer,
)

# Fields of the attention kernels' records: addresses, strides in elements (of the dense mask: in
# bytes) and sizes. An absent tensor has address 0; a broadcast dimension has stride 0.
INTEGERS = (
    *("query", "key", "value", "out"),  # (B, Hq, Lq, D), (B, Hkv, Lk, D | Dv), (B, Hq, Lq, Dv)
    "lse",  # (B, Hq, query_rows), contiguous, float64; float32 where the tensors are half
    *("query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row"),
    *("value_batch", "value_head", "value_row", "out_batch", "out_head", "out_row"),
    "half",  # the type of q, k, v, out: 0 the one computed in, 1 bfloat16, 2 float16
    *("batch", "heads", "key_heads", "query_len", "key_len", "head_dim", "value_dim"),
    "tile",  # queries a tile has: a multiple of the lanes
    *("query_rows", "query_starts", "key_starts"),  # packed: the starts are (batch + 1,) int64
    "few",  # sequences of at most so many queries are for `attention_decode`, others for the tiles
    *("band_lower", "band_upper", "band"),  # bounds on j - i; band (B, 2) int64
    *("key_lengths", "query_lengths"),  # (B,) int64
    *("query_documents", "query_documents_batch"),  # (B, Lq) int64
    *("key_documents", "key_documents_batch"),  # (B, Lk) int64
    *("bias", "bias_batch", "bias_head", "bias_row", "bias_column"),  # (B, Hq, Lq, Lk)
    "bias_half",  # as `half`
    *("dense", "dense_batch", "dense_head", "dense_row", "dense_column"),  # (B, Hq, Lq, Lk) bool
    *("alibi", "alibi_batch", "alibi_offset", "alibi_offset_batch"),  # float64 (B, Hq), int64 (B,)
    "sinks",  # (Hq,) float64
    *("dropout", "threshold", "seed", "batch_start"),  # 0 or 1; words below threshold drop
)
# scale is the scores' factor times log2 e; with a softcap c > 0 it is the factor / c, and cap is
# c * log2 e. Without one cap is 0.
REALS = ("scale", "keep_scale", "cap")


@jit
def sequence_of(call, b):
    """Where batch element b lies: (index in memory, first query, first key, Lq, Lk)."""
    place, first_query, first_key = b, 0, 0
    query_len, key_len = call.query_len, call.key_len
    if call.query_starts != 0:
        queries, keys = integers_at(call.query_starts) + b, integers_at(call.key_starts) + b
        place, first_query, first_key = 0, queries[0], keys[0]
        query_len, key_len = queries[1] - queries[0], keys[1] - keys[0]
    return place, first_query, first_key, query_len, key_len


@jit
def tile_vectors(rows, like):
    """Vectors that hold `rows` queries, one a lane."""
    lanes = lanes_of(like)
    return min(VECTORS, (rows + lanes - 1) // lanes)


@jit
def limits(call, b, query_len, key_len):
    """Of batch element b: lower and upper bound of j - i, and how many queries and keys count."""
    lower, upper = call.band_lower, call.band_upper
    if call.band != 0:
        band = integers_at(call.band) + 2 * b
        lower, upper = max(lower, band[0]), min(upper, band[1])
    keys, queries = key_len, query_len
    if call.key_lengths != 0:
        keys = min(keys, integers_at(call.key_lengths)[b])
    if call.query_lengths != 0:
        queries = min(queries, integers_at(call.query_lengths)[b])
    return lower, upper, queries, keys


@jit
def key_ranges(call, b, start, rows, width, query_len, key_len, first, last):
    """The keys first[r] to last[r] that each query of the tile may attend by band and lengths.

    Returns (begin, end, common_first, common_last): keys begin <= j < end are attended by some
    query, those from common_first to common_last by all. Lanes past the last row attend anything
    (their results are not used); a query that may attend nothing has last = -1.
    """
    lower, upper, queries, keys = limits(call, b, query_len, key_len)
    begin, end, common_first, common_last = key_len, 0, 0, key_len - 1
    firsts, lasts = as_integers32(first), as_integers32(last)
    last_row = start + rows - 1
    if last_row < queries and last_row + lower <= 0 and start + upper >= keys - 1 and keys > 0:
        # every query may attend every key that counts
        for r in range(width):
            firsts[r] = 0
            lasts[r] = keys - 1
        return 0, keys, 0, keys - 1
    for r in range(width):
        i = start + r
        low, high = max(0, i + lower), min(keys - 1, i + upper)
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
def _load_bias(call, b, h, start, rows, width, k0, keys, terms, scratch):
    """terms = log2(e) * bias, transposed."""
    lanes = lanes_of(terms)
    zero = call.zero
    factor = cast(LOG2_E, zero)
    offset = b * call.bias_batch + h * call.bias_head
    offset += start * call.bias_row + k0 * call.bias_column
    source, row = readable(
        call.bias_half,
        call.bias,
        offset,
        call.bias_row,
        1 if call.bias_row == 0 else rows,
        1 if call.bias_column == 0 else keys,
        scratch,
        zero,
    )
    if call.bias_row == 0:
        for k in range(keys):
            same = splat(source[k * call.bias_column] * factor)
            for v in range(0, width, lanes):
                store(terms + (k * width + v), same)
    elif call.bias_column == 1:
        transpose(source, row, terms, width, rows, keys, factor)
    else:
        for k in range(keys):
            for r in range(rows):
                terms[k * width + r] = source[r * row + k * call.bias_column] * factor


@jit
def _subtract_decay(call, b, h, start, width, k0, keys, terms):
    """terms -= log2(e) * slope * |i + offset - j| (ALiBi)."""
    zero = call.zero
    slope = pointer(call.alibi, 0.0)[b * call.alibi_batch + h]
    offset = integers_at(call.alibi_offset)[b * call.alibi_offset_batch]
    decay = splat(cast(-LOG2_E * slope, zero))
    nothing = splat(cast(0.0, zero))
    for v in range(0, width, lanes_of(terms)):
        for k in range(keys):
            first = splat(cast(float(start + v + offset - (k0 + k)), zero))
            distance = first + lane_floats(zero)
            distance = maximum(distance, nothing - distance)
            at = terms + (k * width + v)
            store(at, multiply_add(distance, decay, load(at)))


@jit
def _forbid(call, b, h, start, rows, width, k0, keys, terms):
    """terms = -inf where the dense mask or the documents forbid a pair."""
    minus_infinity = cast(-math.inf, call.zero)
    if call.dense != 0:
        allowed = bytes_at(call.dense) + (b * call.dense_batch + h * call.dense_head)
        allowed = allowed + (start * call.dense_row + k0 * call.dense_column)
        for k in range(keys):
            if call.dense_row == 0:
                if allowed[k * call.dense_column] == 0:
                    for v in range(0, width, lanes_of(terms)):
                        store(terms + (k * width + v), splat(minus_infinity))
            else:
                for r in range(rows):
                    if allowed[r * call.dense_row + k * call.dense_column] == 0:
                        terms[k * width + r] = minus_infinity
    if call.query_documents != 0 and not _same_document(call, b, start, rows, k0, keys)[1]:
        queries = integers_at(call.query_documents) + (b * call.query_documents_batch + start)
        ids = integers_at(call.key_documents) + (b * call.key_documents_batch + k0)
        for k in range(keys):
            for r in range(rows):
                if queries[r] != ids[k]:
                    terms[k * width + r] = minus_infinity


@jit
def add_terms(call, b, h, start, rows, width, k0, keys, scores, terms, scratch):
    """scores += log2(e) * (bias + ALiBi), and -inf where bias, dense mask or documents say so.

    `scores` and `terms` are (keys, width); `terms` and `scratch`, of the same size, are scratch.
    """
    lanes = lanes_of(scores)
    if call.bias != 0:
        _load_bias(call, b, h, start, rows, width, k0, keys, terms, scratch)
    else:
        for at in range(0, keys * width, lanes):
            store(terms + at, splat(cast(0.0, call.zero)))
    if call.alibi != 0:
        _subtract_decay(call, b, h, start, width, k0, keys, terms)
    _forbid(call, b, h, start, rows, width, k0, keys, terms)
    nothing = splat(cast(-math.inf, call.zero))
    for at in range(0, keys * width, lanes):
        added = load(terms + at)
        store(scores + at, select(added == nothing, nothing, load(scores + at) + added))


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
