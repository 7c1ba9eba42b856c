"""Shared by the attention kernels: ranges of keys and queries, scores, masks, dropout.

Tiles are written for any orientation: `i` and `j`, the positions of queries and keys, are tensors
that broadcast against each other, (M, 1) and (1, N) or (1, M) and (N, 1); the head `h` is one for
the whole tile, or a tensor of the shape of `i`. Arguments that belong together come as one tuple;
an absent part is None, decided when the kernel is compiled:

    tensor  (pointer, batch stride, head stride, row stride, what divides the strides), in elements;
            columns are contiguous
    mask    (band (B, 2) int64, key lengths (B,) int64, query lengths (B,) int64, query documents
            (B, Lq) int64, key documents (B, Lk) int64, dense, prefix lengths (B,) int64), dense
            None or (bool pointer, four strides)
    bias    None or (pointer, four strides), a broadcast dimension with stride 0
    alibi   None or (slopes, batch stride, head stride, offsets (B | 1,) int64, stride)

Scores are in base 2 everywhere: score * log2 e, so that weights are one exp2.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .philox import philox4x32

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
NO_BOUND = tl.constexpr(2**30)  # a band bound that no position reaches
# Keys that a dense mask or a bias is read for at once, where its rows allow: 16 bytes or more.
PAIRS_AT_ONCE = tl.constexpr(16)
# Arguments that change from call to call and must not be compiled for: Triton specialises any other
# int for multiples of 16 and for 1, every element of a tuple too, so that band_lower and band_upper
# stand apart from the mask.
DO_NOT_SPECIALIZE = [
    *("query_len", "key_len", "chunks", "batches", "band_lower", "band_upper"),
    *("seed", "threshold", "batch_start"),
]


@triton.jit
def limits(band_lower, band_upper, mask, b, query_len, key_len):
    """Of batch element b: lower and upper bound of j - i, how many queries and keys count and, with
    a prefix in the mask, how many of these have no upper bound."""
    band, key_lengths, query_lengths, prefix_lengths = mask[0], mask[1], mask[2], mask[6]
    lower = tl.full((), band_lower, tl.int32)
    upper = tl.full((), band_upper, tl.int32)
    queries = tl.full((), query_len, tl.int32)
    keys = tl.full((), key_len, tl.int32)
    if band is not None:
        lower = tl.maximum(lower, tl.maximum(tl.load(band + 2 * b), -NO_BOUND).to(tl.int32))
        upper = tl.minimum(upper, tl.minimum(tl.load(band + 2 * b + 1), NO_BOUND).to(tl.int32))
    if key_lengths is not None:
        keys = tl.minimum(keys, tl.load(key_lengths + b)).to(tl.int32)
    if query_lengths is not None:
        queries = tl.minimum(queries, tl.load(query_lengths + b)).to(tl.int32)
    if prefix_lengths is not None:
        prefix = tl.minimum(keys, tl.maximum(tl.load(prefix_lengths + b), 0)).to(tl.int32)
        keys = tl.where(lower > upper, prefix, keys)
        bounds = (lower, upper, queries, keys, prefix)
    else:
        # bounds that exclude each other leave no key; one that nobody attends must not be read
        keys = tl.where(lower > upper, 0, keys)
        bounds = (lower, upper, queries, keys)  # type: ignore[assignment]
    return bounds


@triton.jit
def sequence_of(packed, b, query_len, key_len):
    """Where batch element b lies: (index in memory, first query, first key, Lq, Lk).

    `packed` is None or (query starts, key starts), (n + 1,) int64 each.
    """
    if packed is not None:
        first_query, first_key = tl.load(packed[0] + b), tl.load(packed[1] + b)
        queries = (tl.load(packed[0] + b + 1) - first_query).to(tl.int32)
        keys = (tl.load(packed[1] + b + 1) - first_key).to(tl.int32)
        sequence = (tl.zeros_like(first_query), first_query, first_key, queries, keys)
    else:
        nothing = tl.full((), 0, tl.int64)
        lengths = (tl.full((), query_len, tl.int32), tl.full((), key_len, tl.int32))
        sequence = (b, nothing, nothing, lengths[0], lengths[1])
    return sequence


@triton.jit
def key_blocks(start, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys of the queries start, ..., start + BLOCK_M - 1.

    Returns (first, end, begin, full_begin, full_end): some query attends each of the keys first
    <= j < end and all attend those from full_begin to full_end; blocks start at `begin`.
    """
    lower, upper, queries, keys = bounds[0], bounds[1], bounds[2], bounds[3]
    last = tl.minimum(start + BLOCK_M, queries) - 1
    first = tl.maximum(start + lower, 0)
    end, full_end = last + upper + 1, start + upper + 1
    if len(bounds) > 4:
        end, full_end = tl.maximum(end, bounds[4]), tl.maximum(full_end, bounds[4])
    end = tl.minimum(keys, end)
    end = tl.where(start < queries, tl.maximum(end, 0), 0)
    begin = first // BLOCK_N * BLOCK_N
    full_begin = (tl.maximum(last + lower, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(tl.minimum(keys, full_end), 0) // BLOCK_N * BLOCK_N
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(end, begin))
    full_end = tl.maximum(tl.minimum(full_end, end), full_begin)
    return first, end, begin, full_begin, full_end


@triton.jit
def query_blocks(start, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries of the keys start, ..., start + BLOCK_N - 1; as `key_blocks`."""
    lower, upper, queries, keys = bounds[0], bounds[1], bounds[2], bounds[3]
    last = tl.minimum(start + BLOCK_N, keys) - 1
    first, full_begin = start - upper, last - upper
    if len(bounds) > 4:
        first = tl.where(start < bounds[4], 0, first)
        full_begin = tl.where(last < bounds[4], 0, full_begin)
    first = tl.maximum(first, 0)
    end = tl.minimum(queries, last - lower + 1)
    end = tl.where(start < keys, tl.maximum(end, 0), 0)
    begin = first // BLOCK_M * BLOCK_M
    full_begin = (tl.maximum(full_begin, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    full_end = tl.maximum(tl.minimum(queries, start - lower + 1), 0) // BLOCK_M * BLOCK_M
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(end, begin))
    full_end = tl.maximum(tl.minimum(full_end, end), full_begin)
    return first, end, begin, full_begin, full_end


@triton.jit
def head_of(tensor, b, h, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Head (b, h) from row `first` on for `load_rows`: address, row stride, a tile's offsets.

    Triton knows strides that are multiples of 16. Of others, those of heads of 72 or 88 for
    instance, it must see what divides them, or it reads their elements one by one.
    """
    row = tensor[3] // tensor[4] * tensor[4]
    offsets = tl.arange(0, ROWS)[:, None] * row + tl.arange(0, COLUMNS)[None, :]
    at = tl.multiple_of(b * tensor[1] + h * tensor[2] + first * row, tensor[4])
    return tensor[0] + at, row, offsets


@triton.jit
def load_rows(head, start, first, end, GUARD: tl.constexpr, DIM: tl.constexpr):
    """The tile of rows from `start` on of a `head_of`; zeros past column DIM.

    With GUARD rows outside first <= row < end are zeros, and not read. Offsets within a head are
    32-bit, and `start` joins the one address: 64-bit ones would fill the registers of every loop.
    """
    base, row_stride, offsets = head
    at = base + start * row_stride + offsets
    column = tl.arange(0, at.shape[1])[None, :]
    if GUARD:
        row = start + tl.arange(0, at.shape[0])[:, None]
        inside = (row >= first) & (row < end)
        if at.shape[1] != DIM:
            inside = inside & (column < DIM)
        return tl.load(at, mask=inside, other=0.0)
    if at.shape[1] != DIM:
        return tl.load(at, mask=column < DIM, other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(tensor, b, h, first, start, end, tile, DIM: tl.constexpr):
    """Write the rows of `tile` that lie before `end`, and its first DIM columns.

    `start` and `end` count from row `first` of head (b, h).
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    base, _, offsets = head_of(tensor, b, h, first + start, ROWS, COLUMNS)
    at = base + offsets
    inside = (start + tl.arange(0, ROWS)[:, None] < end) & (tl.arange(0, COLUMNS)[None, :] < DIM)
    tl.store(at, tile.to(tensor[0].dtype.element_ty), mask=inside)


@triton.jit
def exp2_difference(a, b, rest):
    """2^(a - b - rest) for a <= b + rest, with what rounding takes from a - b where |a| <= |b|
    (Dekker 1971). A rest of more than 2^-13, which only numbers from 2^11 on have in float32, is
    taken from the difference; a smaller one by the first term of its series."""
    difference = a - b
    large = tl.where(tl.abs(rest) > 2.0**-13, rest, 0.0)
    taken = a - (tl.maximum(difference, -1000.0) + b)
    taken = tl.where(difference > -1000.0, taken, 0.0)
    low = taken - (rest - large)
    return tl.math.exp2(difference - large) * (1.0 + low * LN_2)


@triton.jit
def _tanh(x):
    """tanh to the last bits: by its series near 0, where 1 - e^-2|x| would cancel."""
    e = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0.0, -large, large)
    if x.dtype == tl.float64:
        return large
    s = x * x
    series = x + x * s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
    return tl.where(s < 0.0625, series, large)


@triton.jit
def _apart(tile):
    """`tile` as it is, cut off from where it was loaded, in the compiler's eyes.

    Triton gives the operand of a product a layout for the narrowest type that it was loaded in, and
    has none for float64 that came, by arithmetic, from a narrower one (it fails: 'Currently fp64
    don't support largeK MMA'). It does not look behind a reduction.
    """
    return tl.max(tile[:, :, None], 2)


@triton.jit
def within(i, j, bounds, MASKED: tl.constexpr):
    """A mask of the pairs within (lower, upper, queries, keys, prefix) of `limits`.

    One test a pair: how far it lies behind the first of its row, without a sign, against how many
    the row has.
    """
    lower, upper, queries, keys = bounds[0], bounds[1], bounds[2], bounds[3]
    if not MASKED:
        inside = (j < keys) & (i < queries)
    elif i.shape[0] == 1:  # a row is a key
        if len(bounds) > 4:  # all queries from 0 on attend the prefix
            upper = tl.where(j < bounds[4], tl.maximum(upper, j), upper)
        least = tl.maximum(lower, j - (queries - 1))
        count = tl.where((least > upper) | (j >= keys), 0, upper - least + 1)
        inside = (i - (j - upper)).to(tl.uint32) < count.to(tl.uint32)
    else:
        if len(bounds) > 4:
            upper = tl.maximum(upper, bounds[4] - 1 - i)
        most = tl.minimum(upper, keys - 1 - i)
        count = tl.where((lower > most) | (i >= queries), 0, most - lower + 1)
        inside = (j - (i + lower)).to(tl.uint32) < count.to(tl.uint32)
    return inside


@triton.jit
def chunks_within(i, j, bounds):
    """A mask of the chunks of PAIRS_AT_ONCE keys that begin within the bounds."""
    inside = (i < bounds[2]) & (j // PAIRS_AT_ONCE * PAIRS_AT_ONCE < bounds[3])
    if i.shape[0] == 1:
        inside = tl.max_constancy(inside, (PAIRS_AT_ONCE, 1))
    else:
        inside = tl.max_constancy(inside, (1, PAIRS_AT_ONCE))
    return inside


@triton.jit
def address_of(pairs, i, j, b, h):
    """Where `pairs`, as (pointer, four strides, mark), has (b, h, i, j)."""
    at = pairs[0] + b * pairs[1] + h.to(tl.int64) * pairs[2]
    return at + i.to(tl.int64) * pairs[3] + j.to(tl.int64) * pairs[4]


@triton.jit
def load_pairs(pairs, i, j, b, h, bounds, allowed):
    """A dense mask or a bias where `allowed`, and in whole chunks around; else zeros."""
    inside = allowed
    if len(pairs) == 6:  # else keys are read one by one
        inside = chunks_within(i, j, bounds)
    return tl.load(address_of(pairs, i, j, b, h), mask=inside, other=0)


@triton.jit
def pairs_of(i, j, b, h, terms, dtype: tl.constexpr, MASKED: tl.constexpr):
    """A mask of the pairs that may attend, and the bias of each pair (without one, anything).

    `terms` are (mask, bias, alibi, score_factor, cap_factor, bounds), the last what
    `limits` returns. Without MASKED every pair is within the bounds.

    It comes before the product that it belongs to: of two layouts that reach a sum over a tile's
    rows, Triton takes that of what is read or multiplied last. With the mask's, all scores would
    be laid out like the mask as well, and their weights computed in both layouts.
    """
    mask, bias, _, _, _, bounds = terms
    h = h.to(tl.int64)  # times a stride it may pass 32 bits
    allowed = within(i, j, bounds, MASKED)
    if mask[3] is not None:
        left = tl.load(mask[3][0] + b * mask[3][1] + i, mask=i < bounds[2], other=0)
        right = tl.load(mask[4][0] + b * mask[4][1] + j, mask=j < bounds[3], other=0)
        allowed = allowed & (left == right)
    if mask[5] is not None:
        marks = load_pairs(mask[5], i, j, b, h, bounds, allowed)
        allowed = allowed & ((_apart(marks) if dtype == tl.float64 else marks) != 0)
    added = allowed
    if bias is not None:
        bias_tile = load_pairs(bias, i, j, b, h, bounds, allowed)
        if dtype == tl.float64 and bias_tile.dtype != tl.float64:
            bias_tile = _apart(bias_tile)
        added = bias_tile.to(dtype)
        allowed = allowed & (added > -float("inf"))
    return allowed, added


@triton.jit
def scores_of(product, pairs, i, j, b, h, terms, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Base-2 scores from q k^T, -inf where `pairs`, of `pairs_of`, has none.

    score_factor in `terms` is scale * log2 e; with a softcap c it is scale / c, and cap_factor
    c * log2 e. Returns (scores, the softcap's derivative).
    """
    allowed, added = pairs
    _, bias, alibi, score_factor, cap_factor, _ = terms
    dtype = product.dtype
    factor = tl.full((1, 1), score_factor, dtype)
    slope = product
    if SOFTCAP:
        capped = _tanh(product * factor)
        slope = 1.0 - capped * capped
        scores = capped * tl.full((1, 1), cap_factor, dtype)
    else:
        scores = product * factor
    if alibi is not None:
        slopes, slopes_batch, slopes_head, offsets, offsets_batch = alibi
        decay = tl.load(slopes + b * slopes_batch + h.to(tl.int64) * slopes_head).to(dtype) * LOG2_E
        offset = tl.load(offsets + b * offsets_batch).to(tl.int32)
        scores -= decay * tl.abs(i + offset - j).to(dtype)
    if bias is not None:
        scores += added * LOG2_E
    if MASKED:
        scores = tl.where(allowed, scores, -float("inf"))
    return scores, slope


@triton.jit
def attended_keys(allowed, product, terms, dtype: tl.constexpr):
    """A mask (N,) of the columns of `allowed` (M, N), of `pairs_of`, that are true in some row.

    The product that `allowed` belongs to, of factors in `dtype`, changes nothing of it. It keeps
    the test in the layout of the scores, which matrix instructions decide: it would else be
    computed outside of it as well, in registers of its own. FMAs have another layout, and spilled.
    """
    if dtype.primitive_bitwidth == 16:
        allowed = allowed & ((product.to(tl.int32, bitcast=True) | 1) != 0)
    elif terms[0][5] is None and terms[1] is None:
        return tl.max(allowed.to(tl.int32), 0) > 0
    # threads exchange the marks that each has of a row as bits of one word
    M: tl.constexpr = allowed.shape[0]
    N: tl.constexpr = allowed.shape[1]
    bit = tl.arange(0, 16)
    words = tl.sum(tl.reshape(allowed.to(tl.int32), (M, N // 16, 16)) << bit[None, None, :], 2)
    found = tl.reduce_or(words, 0)
    return tl.reshape((found[:, None] >> bit[None, :]) & 1, (N,)) != 0


@triton.jit
def accumulate(total, left, right, PRECISION: tl.constexpr):
    """total + left right, with `left` in the type of `right`."""
    left = left.to(right.dtype)
    if right.dtype.primitive_bitwidth >= 32:
        # blocks are summed apart: one sum over the whole length would round far more
        return total + tl.dot(left, right, input_precision=PRECISION, out_dtype=total.dtype)
    return tl.dot(left, right, total, out_dtype=total.dtype)


@triton.jit
def random_words(i, j0, b, h, seed, N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The random word of every weight of a tile: (N, M) with KEYS_FIRST, else (M, N).

    Four neighbouring keys share one Philox call; j0 is a multiple of 4.
    """
    group = (j0 // 4 + tl.arange(0, N // 4)).to(tl.uint32)
    M: tl.constexpr = i.shape[1] if KEYS_FIRST else i.shape[0]
    if KEYS_FIRST:
        zeros = tl.zeros((N // 4, M), tl.uint32)
        group = group[:, None] + zeros
    else:
        zeros = tl.zeros((M, N // 4), tl.uint32)
        group = group[None, :] + zeros
    query, head, batch = zeros + i.to(tl.uint32), zeros + h.to(tl.uint32), zeros + b.to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(group, query, head, batch, seed)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., x, y] is word 2 x + y
    if KEYS_FIRST:
        tile = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (N, M))
    else:
        tile = tl.reshape(words, (M, N))
    return tile
