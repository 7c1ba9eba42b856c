"""Attention backward: one kernel for d_key and d_value, one for d_query, no atomics.

With P recomputed from lse, M = dropout's keep mask / (1 - p) and delta = sum_k(dO * O) - dlse:

    P = 2^(S - lse * log2 e)        dP = dO V^T        dS = P * (M * dP - delta)      d_bias = dS
    dV = (P * M)^T dO               dK = scale * dS^T Q                dQ = scale * dS K

(Dao et al. 2022, algorithm 4.) lse * log2 e is lse_log2 + lse_log2_low, a rounded value and what
rounding took off. Each sum has one order, so the bits are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import (
    DO_NOT_SPECIALIZE,
    LOG2_E,
    accumulate,
    address_of,
    attended_keys,
    chunks_within,
    exp2_difference,
    head_of,
    key_blocks,
    limits,
    load_rows,
    pairs_of,
    query_blocks,
    random_words,
    scores_of,
    sequence_of,
    store_rows,
)
from .philox import load_seed


@triton.jit(do_not_specialize=[*DO_NOT_SPECIALIZE, "query_rows"])
def backward_preprocess(
    grad_out,
    out,
    lse,
    grad_lse,
    lse_log2,
    lse_log2_low,
    delta,
    packed,
    heads,
    query_len,
    query_rows,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """lse_log2 + lse_log2_low = lse * log2 e and delta = sum(dO * O) - dlse of every row.

    grad_out, out (B, Hq, Lq, Dv); lse, grad_lse (or None), lse_log2, lse_log2_low (or None: lse is
    no wider than lse_log2) and delta (B, Hq, Lq), contiguous. A row that attends nothing gets
    lse_log2 = inf, which makes all its weights 0, and delta = 0.

    Grid: tiles of BLOCK_M queries x Hq x B.
    """
    tiles = tl.cdiv(query_len, BLOCK_M)
    program = tl.program_id(0)
    i0 = program % tiles * BLOCK_M
    h = (program // tiles % heads).to(tl.int64)
    b = (program // tiles // heads).to(tl.int64)
    batch_index, first_query, _, query_len, _ = sequence_of(packed, b, query_len, 0)
    i = i0 + tl.arange(0, BLOCK_M)
    row = (batch_index * heads + h) * query_rows + first_query + i
    inside = i < query_len
    dtype = delta.dtype.element_ty

    row_lse = tl.load(lse + row, mask=inside, other=-float("inf"))
    empty = row_lse == -float("inf")
    both = tl.where(empty, 0.0, row_lse) * LOG2_E
    high = both.to(dtype)
    tl.store(lse_log2 + row, tl.where(empty, float("inf"), high), mask=inside)
    if lse_log2_low is not None:
        tl.store(lse_log2_low + row, (both - high.to(both.dtype)).to(dtype), mask=inside)

    grad_head = head_of(grad_out, batch_index, h, first_query, BLOCK_M, BLOCK_DV)
    grad_tile = load_rows(grad_head, i0, 0, query_len, True, VALUE_DIM)
    out_head = head_of(out, batch_index, h, first_query, BLOCK_M, BLOCK_DV)
    out_tile = load_rows(out_head, i0, 0, query_len, True, VALUE_DIM)
    row_delta = tl.sum(grad_tile.to(dtype) * out_tile.to(dtype), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + row, mask=inside, other=0.0).to(dtype)
    tl.store(delta + row, tl.where(empty, 0.0, row_delta), mask=inside)


@triton.jit
def load_statistics(statistics, start, first, end, GUARD: tl.constexpr, ROWS: tl.constexpr):
    """lse_log2, lse_log2_low (0 where it is absent) and delta of ROWS rows from `start` on.

    `statistics`: (lse_log2, lse_log2_low, delta, offset of row 0). With GUARD, rows outside
    first <= row < end have lse_log2 = inf.
    """
    lse_log2, lse_log2_low, delta, row = statistics
    at = start + tl.arange(0, ROWS)
    inside = None
    if GUARD:
        inside = (at >= first) & (at < end)
    high = tl.load(lse_log2 + row + at, mask=inside, other=float("inf") if GUARD else None)
    row_delta = tl.load(delta + row + at, mask=inside, other=0.0 if GUARD else None)
    low = tl.zeros_like(high)
    if lse_log2_low is not None:
        low = tl.load(lse_log2_low + row + at, mask=inside, other=0.0 if GUARD else None)
    return high, low, row_delta


@triton.jit
def score_gradients(
    left,
    right,
    d_left,
    d_right,
    i,
    j,
    position,
    statistics,
    terms,
    dropout,
    MASKED: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(P * M, dS before the softcap, dS after it, allowed, Q K^T) of one tile.

    (left, right, d_left, d_right) are (Q, K, dO, V), or with KEYS_FIRST (K, Q, V, dO): then the
    tile is transposed. `position` is (j0, b, h); `statistics` broadcast against the tile.
    """
    lse_log2, lse_log2_low, delta = statistics
    j0, b, h = position
    dtype = delta.dtype
    pairs = pairs_of(i, j, b, h, terms, dtype, MASKED)
    product = tl.dot(left, tl.trans(right), input_precision=PRECISION, out_dtype=dtype)
    scores, slope = scores_of(product, pairs, i, j, b, h, terms, MASKED, SOFTCAP)
    if left.dtype.primitive_bitwidth == 16:
        weights = tl.math.exp2(scores - lse_log2 - lse_log2_low)
    else:
        weights = exp2_difference(scores, lse_log2, lse_log2_low)
    d_weights = tl.dot(d_left, tl.trans(d_right), input_precision=PRECISION, out_dtype=dtype)
    dropped_weights = weights
    if dropout is not None:
        seed, threshold, batch_start, keep_scale = dropout
        N: tl.constexpr = left.shape[0] if KEYS_FIRST else right.shape[0]
        words = random_words(i, j0, b + batch_start, h, seed, N, KEYS_FIRST)
        factor = tl.where(words >= threshold, tl.full((1, 1), keep_scale, dtype), 0.0)
        dropped_weights = weights * factor
        d_weights *= factor
    d_scores = weights * (d_weights - delta)
    if MASKED:  # a product with a key that may hold NaN is masked, not multiplied by 0
        d_scores = tl.where(pairs[0], d_scores, 0.0)
    d_product = d_scores
    if SOFTCAP:
        d_product = d_scores * slope
        if MASKED:
            d_product = tl.where(pairs[0], d_product, 0.0)
    return dropped_weights, d_scores, d_product, pairs[0], product


@triton.jit
def _add_queries(
    state,
    tile,
    statistics,
    terms,
    dropout,
    i0,
    MASKED: tl.constexpr,
    EMPTY_ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(d_key / scale, d_value) after the block of queries from i0 on."""
    d_key_tile, d_value_tile = state
    key_tile, value_tile, query, grad_out, j0, first, end, b, h = tile
    query_tile = load_rows(query, i0, first, end, MASKED, HEAD_DIM)
    grad_tile = load_rows(grad_out, i0, first, end, MASKED, VALUE_DIM)
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    high, low, row_delta = load_statistics(statistics, i0, first, end, MASKED, BLOCK_M)
    if EMPTY_ROWS:  # a row that attends nothing may hold NaN
        alive = (high != float("inf"))[:, None]
        query_tile = tl.where(alive, query_tile, 0.0).to(query_tile.dtype)
        grad_tile = tl.where(alive, grad_tile, 0.0).to(grad_tile.dtype)
    dropped_weights, _, d_product, _, _ = score_gradients(
        key_tile,
        query_tile,
        value_tile,
        grad_tile,
        i[None, :],
        j[:, None],
        (j0, b, h),
        (high[None, :], low[None, :], row_delta[None, :]),
        terms,
        dropout,
        MASKED,
        True,
        SOFTCAP,
        PRECISION,
    )
    d_value_tile = accumulate(d_value_tile, dropped_weights, grad_tile, PRECISION)
    d_key_tile = accumulate(d_key_tile, d_product, query_tile, PRECISION)
    return d_key_tile, d_value_tile


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def backward_dkdv(
    query,
    key,
    value,
    grad_out,
    d_key,
    d_value,
    lse_log2,
    lse_log2_low,
    delta,
    band_lower,
    band_upper,
    mask,
    bias,
    alibi,
    packed,
    seed,
    threshold: tl.uint32,
    batch_start,
    keep_scale: tl.float64,
    scale: tl.float64,
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
    EMPTY_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d_key (B, Hkv, Lk, D) and d_value (B, Hkv, Lk, Dv), summed over the heads of each group.

    Arguments as in `forward` and `backward_preprocess`. EMPTY_ROWS: some row may attend nothing;
    GROUP: Hq / Hkv. Grid: tiles of BLOCK_N keys x Hkv x B.
    """
    tiles = tl.cdiv(key_len, BLOCK_N)
    program = tl.program_id(0)
    j0 = program % tiles * BLOCK_N  # under a causal mask the first tiles are the longest
    key_head = program // tiles % key_heads
    b = (program // tiles // key_heads).to(tl.int64)

    batch_index, first_query, first_key, query_len, key_len = sequence_of(
        packed, b, query_len, key_len
    )
    bounds = limits(band_lower, band_upper, mask, b, query_len, key_len)
    keys = bounds[3]
    first, end, begin, full_begin, full_end = query_blocks(j0, bounds, BLOCK_M, BLOCK_N)
    terms = (mask, bias, alibi, score_factor, cap_factor, bounds)
    dropout = None
    if DROPOUT:
        dropout = (load_seed(seed), threshold.to(tl.uint32), batch_start, keep_scale)

    wide_head = key_head.to(tl.int64)
    key_rows = head_of(key, batch_index, wide_head, first_key, BLOCK_N, BLOCK_D)
    key_tile = load_rows(key_rows, j0, 0, keys, True, HEAD_DIM)
    value_rows = head_of(value, batch_index, wide_head, first_key, BLOCK_N, BLOCK_DV)
    value_tile = load_rows(value_rows, j0, 0, keys, True, VALUE_DIM)
    state = (tl.zeros((BLOCK_N, BLOCK_D), DTYPE), tl.zeros((BLOCK_N, BLOCK_DV), DTYPE))

    if ARBITRARY_MASK:
        full_begin, full_end = end, end
    edges = (begin, full_begin, full_end, end)
    STEP: tl.constexpr = BLOCK_M if GROUP == 1 else 1
    for PHASE in tl.static_range(3):  # blocks that the band cuts, whole ones, cut ones
        if PHASE == 0 or not ARBITRARY_MASK:
            start, stop = edges[PHASE], edges[PHASE + 1]
            blocks = tl.cdiv(stop - start, BLOCK_M)
            if GROUP != 1:  # one loop for all heads: a loop in a loop would take more registers
                start, stop = 0, GROUP * blocks
            # In 64 bits from the start. Where LLVM widens the counter itself, it does so on the way
            # around a loop that does not run too, and sets the sums to zero there: to ptxas that
            # changes what a wgmma in flight adds to, and it runs them all one by one (C7515).
            for wide_step in range(tl.cast(start, tl.int64), tl.cast(stop, tl.int64), STEP):
                step = tl.cast(wide_step, tl.int32)
                i0, h = step, key_head
                if GROUP != 1:
                    i0 = edges[PHASE] + step % blocks * BLOCK_M
                    h = key_head * GROUP + step // blocks
                wide_h = tl.full((), h, tl.int64)
                query_head = head_of(query, batch_index, wide_h, first_query, BLOCK_M, BLOCK_D)
                grad_head = head_of(grad_out, batch_index, wide_h, first_query, BLOCK_M, BLOCK_DV)
                tile = (key_tile, value_tile, query_head, grad_head, j0, first, end, b, h)
                row = (batch_index * heads + h) * query_rows + first_query
                statistics = (lse_log2, lse_log2_low, delta, row)
                state = _add_queries(
                    state,
                    tile,
                    statistics,
                    terms,
                    dropout,
                    i0,
                    PHASE != 1,
                    EMPTY_ROWS,
                    SOFTCAP,
                    PRECISION,
                    HEAD_DIM,
                    VALUE_DIM,
                    BLOCK_M,
                    BLOCK_N,
                )

    d_key_tile, d_value_tile = state
    counted = (j0 + tl.arange(0, BLOCK_N) < keys)[:, None]
    d_key_tile = tl.where(counted, d_key_tile * tl.full((1, 1), scale, DTYPE), 0.0)
    d_value_tile = tl.where(counted, d_value_tile, 0.0)
    store_rows(d_key, batch_index, wide_head, first_key, j0, key_len, d_key_tile, HEAD_DIM)
    store_rows(d_value, batch_index, wide_head, first_key, j0, key_len, d_value_tile, VALUE_DIM)


@triton.jit
def _add_keys(
    d_query_tile,
    tile,
    statistics,
    terms,
    dropout,
    d_bias,
    j0,
    MASKED: tl.constexpr,
    ARBITRARY_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d_query / scale after the block of keys from j0 on; writes d_bias if it is not None."""
    query_tile, grad_tile, key, value, i0, first, end, b, h = tile
    key_tile = load_rows(key, j0, first, end, MASKED, HEAD_DIM)
    value_tile = load_rows(value, j0, first, end, MASKED, VALUE_DIM)
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    _, d_scores, d_product, allowed, product = score_gradients(
        query_tile,
        key_tile,
        grad_tile,
        value_tile,
        i,
        j,
        (j0, b, h),
        statistics,
        terms,
        dropout,
        MASKED,
        False,
        SOFTCAP,
        PRECISION,
    )
    if d_bias is not None:
        inside = allowed
        if len(d_bias) == 6:  # gradients of other pairs are 0, as d_bias is before
            inside = chunks_within(i, j, terms[5])
        d_scores = d_scores.to(d_bias[0].dtype.element_ty)
        tl.store(address_of(d_bias, i, j, b, h), d_scores, mask=inside)
    if ARBITRARY_MASK:
        # a key that no query of the tile attends may hold NaN, and 0 * NaN is NaN
        attended = attended_keys(allowed, product, terms, key_tile.dtype)
        key_tile = tl.where(attended[:, None], key_tile, 0.0).to(key_tile.dtype)
    return accumulate(d_query_tile, d_product, key_tile, PRECISION)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def backward_dq(
    query,
    key,
    value,
    grad_out,
    d_query,
    d_bias,
    lse_log2,
    lse_log2_low,
    delta,
    band_lower,
    band_upper,
    mask,
    bias,
    alibi,
    packed,
    seed,
    threshold: tl.uint32,
    batch_start,
    keep_scale: tl.float64,
    scale: tl.float64,
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
    EMPTY_ROWS: tl.constexpr,
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
    """d_query (B, Hq, Lq, D), and d_bias (zeros before) of a bias that nothing shares, or None.

    Arguments as in `forward` and `backward_preprocess`. Grid: tiles of BLOCK_M queries x Hq x B.
    """
    tiles = tl.cdiv(query_len, BLOCK_M)
    program = tl.program_id(0)
    i0 = (tiles - 1 - program % tiles) * BLOCK_M
    h = program // tiles % heads
    b = (program // tiles // heads).to(tl.int64)
    wide_head, key_head = h.to(tl.int64), (h // (heads // key_heads)).to(tl.int64)

    batch_index, first_query, first_key, query_len, key_len = sequence_of(
        packed, b, query_len, key_len
    )
    bounds = limits(band_lower, band_upper, mask, b, query_len, key_len)
    queries = bounds[2]
    first, end, begin, full_begin, full_end = key_blocks(i0, bounds, BLOCK_M, BLOCK_N)
    terms = (mask, bias, alibi, score_factor, cap_factor, bounds)
    dropout = None
    if DROPOUT:
        dropout = (load_seed(seed), threshold.to(tl.uint32), batch_start, keep_scale)

    query_head = head_of(query, batch_index, wide_head, first_query, BLOCK_M, BLOCK_D)
    grad_head = head_of(grad_out, batch_index, wide_head, first_query, BLOCK_M, BLOCK_DV)
    query_tile = load_rows(query_head, i0, 0, query_len, True, HEAD_DIM)
    grad_tile = load_rows(grad_head, i0, 0, query_len, True, VALUE_DIM)
    key = head_of(key, batch_index, key_head, first_key, BLOCK_N, BLOCK_D)
    value = head_of(value, batch_index, key_head, first_key, BLOCK_N, BLOCK_DV)
    i = i0 + tl.arange(0, BLOCK_M)
    rows = (lse_log2, lse_log2_low, delta, (batch_index * heads + h) * query_rows + first_query)
    high, low, row_delta = load_statistics(rows, i0, 0, query_len, True, BLOCK_M)
    statistics = (high[:, None], low[:, None], row_delta[:, None])
    tile = (query_tile, grad_tile, key, value, i0, first, end, b, h)
    d_query_tile = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)

    if ARBITRARY_MASK:
        full_begin, full_end = end, end
    edges = (begin, full_begin, full_end, end)
    for PHASE in tl.static_range(3):  # blocks that the band cuts, whole ones, cut ones
        if (PHASE == 0 and (HAS_LOWER or ARBITRARY_MASK)) or (PHASE > 0 and not ARBITRARY_MASK):
            for j0 in range(edges[PHASE], edges[PHASE + 1], BLOCK_N):
                d_query_tile = _add_keys(
                    d_query_tile,
                    tile,
                    statistics,
                    terms,
                    dropout,
                    d_bias,
                    j0,
                    PHASE != 1,
                    ARBITRARY_MASK,
                    SOFTCAP,
                    PRECISION,
                    HEAD_DIM,
                    VALUE_DIM,
                    BLOCK_M,
                    BLOCK_N,
                )

    counted = ((high != float("inf")) & (i < queries))[:, None]
    d_query_tile = tl.where(counted, d_query_tile * tl.full((1, 1), scale, DTYPE), 0.0)
    store_rows(d_query, batch_index, wide_head, first_query, i0, query_len, d_query_tile, HEAD_DIM)
