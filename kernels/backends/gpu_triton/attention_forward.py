"""Attention forward: online softmax over blocks of keys, one program a tile of queries.

With scores in base 2, each block of keys adds

    S = Q K^T * scale * log2(e);  m' = max(m, max_k S);  P = 2^(S - m')
    l = l * 2^(m - m') + sum_k P;   O = O * 2^(m - m') + drop(P) V

At the end out = O / l and lse = (m + log2 l) * ln 2 (Milakov & Gimelshein 2018; Dao et al. 2022).
A sink is a key of weight 2^(sink - m) without a value: it starts m and l.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    DO_NOT_SPECIALIZE,
    LN_2,
    LOG2_E,
    accumulate,
    attended_keys,
    head_of,
    key_blocks,
    limits,
    load_rows,
    pairs_of,
    random_words,
    scores_of,
    sequence_of,
    store_rows,
)
from .philox import load_seed


@triton.jit
def attend(
    state,
    tile,
    terms,
    dropout,
    k0,
    MASKED: tl.constexpr,
    ARBITRARY_MASK: tl.constexpr,
    RAW_MAX: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(O, m, l) after the block of keys from k0 on.

    `tile`: (Q, key and value of `head_of`, positions of the queries (M, 1), first key, end of the
    keys, batch element, head or heads (M, 1)). RAW_MAX: scores are products times a factor >= 0,
    so that the largest product has the largest score.
    """
    out_tile, row_max, row_sum = state
    query_tile, key, value, i, first, end, b, h = tile
    dtype = out_tile.dtype
    key_tile = load_rows(key, k0, first, end, MASKED, HEAD_DIM)
    j = k0 + tl.arange(0, BLOCK_N)[None, :]
    pairs = pairs_of(i, j, b, h, terms, dtype, MASKED)
    product = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION, out_dtype=dtype)
    scores, _ = scores_of(product, pairs, i, j, b, h, terms, MASKED, SOFTCAP)
    if RAW_MAX:
        # scaling comes after the maximum, and the scores' own is a part of the subtraction's FMA
        largest = tl.max(product, 1) * tl.full((1,), terms[3], dtype)
    else:
        largest = tl.max(scores, 1)
    new_max = tl.maximum(row_max, largest)
    # a row with no key yet has m' = -inf; 0 in its place keeps the differences -inf
    shift = tl.where(new_max == -float("inf"), 0.0, new_max) if MASKED else new_max
    weights = tl.math.exp2(scores - shift[:, None])
    rescale = tl.math.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    if dropout is not None:
        seed, threshold, batch_start = dropout
        words = random_words(i, k0, b + batch_start, h, seed, BLOCK_N, False)
        weights = tl.where(words >= threshold, weights, 0.0)
    value_tile = load_rows(value, k0, first, end, MASKED, VALUE_DIM)
    if ARBITRARY_MASK:
        # a key that no query of the tile attends may hold NaN, and 0 * NaN is NaN
        attended = attended_keys(pairs[0], product, terms, value_tile.dtype)
        value_tile = tl.where(attended[:, None], value_tile, 0.0).to(value_tile.dtype)
    out_tile = accumulate(out_tile * rescale[:, None], weights, value_tile, PRECISION)
    return out_tile, new_max, row_sum


@triton.jit(do_not_specialize=[*DO_NOT_SPECIALIZE, "query_rows"])
def forward(
    query,
    key,
    value,
    out,
    lse,
    band_lower,
    band_upper,
    mask,
    bias,
    alibi,
    sinks,
    packed,
    seed,
    threshold: tl.uint32,
    batch_start,
    keep_scale: tl.float64,
    score_factor: tl.float64,
    cap_factor: tl.float64,
    heads,
    key_heads,
    query_len,
    key_len,
    query_rows,
    DTYPE: tl.constexpr,
    HAS_LOWER: tl.constexpr,
    ARBITRARY_MASK: tl.constexpr,
    NEGATIVE: tl.constexpr,
    DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), out (B, Hq, Lq, Dv).

    lse (B, Hq, Lq) contiguous; sinks (Hq,) or None; `mask`, `bias`, `alibi` as in
    `attention_tiles`; `packed` as in `sequence_of`: then the tensors have one batch element of
    `query_rows` queries, and query_len and key_len are the longest ones. Sums are in DTYPE.
    HAS_LOWER: the band has a lower bound. ARBITRARY_MASK: a dense mask, documents or a bias
    may forbid any pair. NEGATIVE: score_factor < 0. Grid: tiles of BLOCK_M queries x Hq x B.
    """
    tiles = tl.cdiv(query_len, BLOCK_M)
    program = tl.program_id(0)
    # the last tiles, the longest under a causal mask, come first
    i0 = (tiles - 1 - program % tiles) * BLOCK_M
    h = program // tiles % heads
    b = (program // tiles // heads).to(tl.int64)
    key_head = h // (heads // key_heads)

    batch_index, first_query, first_key, query_len, key_len = sequence_of(
        packed, b, query_len, key_len
    )
    bounds = limits(band_lower, band_upper, mask, b, query_len, key_len)
    queries = bounds[2]
    first, end, begin, full_begin, full_end = key_blocks(i0, bounds, BLOCK_M, BLOCK_N)
    dropout = None
    if DROPOUT:
        dropout = (load_seed(seed), threshold.to(tl.uint32), batch_start)

    query_head = head_of(query, batch_index, h.to(tl.int64), first_query, BLOCK_M, BLOCK_D)
    query_tile = load_rows(query_head, i0, 0, query_len, True, HEAD_DIM)
    wide_head = key_head.to(tl.int64)
    key = head_of(key, batch_index, wide_head, first_key, BLOCK_N, BLOCK_D)
    value = head_of(value, batch_index, wide_head, first_key, BLOCK_N, BLOCK_DV)

    out_tile = tl.zeros((BLOCK_M, BLOCK_DV), DTYPE)
    row_max = tl.full((BLOCK_M,), -float("inf"), DTYPE)
    row_sum = tl.zeros((BLOCK_M,), DTYPE)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float64) * LOG2_E
        rounded = sink.to(DTYPE)
        # what rounding takes from the sink; nothing of a huge one
        rest = sink - rounded.to(tl.float64)
        rest = tl.where(tl.abs(rest) < 1.0, rest, 0.0)
        row_max = tl.zeros((BLOCK_M,), DTYPE) + rounded
        row_sum = tl.zeros((BLOCK_M,), DTYPE) + tl.math.exp2(rest.to(DTYPE))
    state = (out_tile, row_max, row_sum)
    i = i0 + tl.arange(0, BLOCK_M)
    tile = (query_tile, key, value, i[:, None], first, end, b, h)
    terms = (mask, bias, alibi, score_factor, cap_factor, bounds)
    if ARBITRARY_MASK:
        full_begin, full_end = end, end
    ONLY_SCALED: tl.constexpr = not (NEGATIVE or SOFTCAP) and alibi is None and bias is None
    edges = (begin, full_begin, full_end, end)
    for PHASE in tl.static_range(3):  # blocks that the band cuts, whole ones, cut ones
        if (PHASE == 0 and (HAS_LOWER or ARBITRARY_MASK)) or (PHASE > 0 and not ARBITRARY_MASK):
            for k0 in range(edges[PHASE], edges[PHASE + 1], BLOCK_N):
                state = attend(
                    state,
                    tile,
                    terms,
                    dropout,
                    k0,
                    PHASE != 1,
                    ARBITRARY_MASK,
                    PHASE == 1 and ONLY_SCALED,
                    SOFTCAP,
                    PRECISION,
                    HEAD_DIM,
                    VALUE_DIM,
                    BLOCK_N,
                )

    out_tile, row_max, row_sum = state
    beyond = i >= queries  # such a row has only the sink
    empty = beyond | (row_sum == 0.0)
    total = tl.where(empty, 1.0, row_sum)
    factor = tl.full((1,), keep_scale, DTYPE) / total
    out_tile = tl.where(empty[:, None], 0.0, out_tile * factor[:, None])
    store_rows(out, batch_index, h.to(tl.int64), first_query, i0, query_len, out_tile, VALUE_DIM)

    wide = lse.dtype.element_ty
    row_lse = (row_max.to(wide) + tl.log2(total.to(wide))) * LN_2
    nothing = tl.full((BLOCK_M,), -float("inf"), wide)
    if sinks is not None:
        nothing = tl.zeros((BLOCK_M,), wide) + tl.load(sinks + h).to(wide)
    row_lse = tl.where(empty, nothing, row_lse)
    row = (batch_index * heads + h) * query_rows + first_query + i
    tl.store(lse + row, row_lse, mask=i < query_len)
