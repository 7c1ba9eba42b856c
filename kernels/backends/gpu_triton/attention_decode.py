"""Attention forward for few queries and many keys: the keys are split over programs.

A tile's rows are all the queries of all the heads that share a key head, so that K and V are read
once for them. `decode` gives each chunk of CHUNK keys its own O, m and l (not yet divided), and
`combine` merges them and the sink s, in the order of the chunks:

    M = max(s, max_c m_c);  L = 2^(s - M) + sum_c l_c 2^(m_c - M);  out = sum_c O_c 2^(m_c - M) / L

(Dao et al., 'Flash-Decoding', 2023.) Where a chunk ends depends neither on the batch nor on the
GPU, and so neither do the bits of a result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_forward import attend
from .attention_tiles import (
    DO_NOT_SPECIALIZE,
    LN_2,
    LOG2_E,
    head_of,
    key_blocks,
    limits,
    sequence_of,
)
from .philox import load_seed

# Keys of a chunk. A context of 8,192 keys and 8 key heads then fills an H100's 132 multiprocessors
# from one batch element, and what is written and read again for a chunk, its float32 O, stays a
# few hundredths of its keys and values for a group of 8 heads.
CHUNK = 512
# Queries times heads of a group, at most: with more, a tile of `forward` is full without this.
MAX_ROWS = tl.constexpr(64)


def splits_keys(query_len: int, group: int, key_len: int) -> bool:
    """Whether the keys are split over programs: a rule of the shape alone."""
    return query_len * group <= MAX_ROWS.value and key_len >= 2 * CHUNK


@triton.jit
def _load_queries(
    query, batch_index, head, i, inside, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The rows of queries i (M, 1) of the heads `head` (M, 1), zeros where not `inside`."""
    column = tl.arange(0, BLOCK_D)[None, :]
    row = batch_index * query[1] + head * query[2] + i * query[3]
    row = tl.multiple_of(row, (query[4], query[4]))
    return tl.load(query[0] + row + column, mask=inside & (column < HEAD_DIM), other=0.0)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def decode(
    query,
    key,
    value,
    partial,
    maxima,
    sums,
    band_lower,
    band_upper,
    mask,
    bias,
    alibi,
    packed,
    seed,
    threshold: tl.uint32,
    batch_start,
    score_factor: tl.float64,
    cap_factor: tl.float64,
    heads,
    key_heads,
    query_len,
    key_len,
    chunks,
    DTYPE: tl.constexpr,
    ARBITRARY_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """O, m and l of every chunk of keys.

    partial (B, Hkv, chunks, R, Dv), maxima and sums (B, Hkv, chunks, R), contiguous, with row
    R = GROUP * Lq for query i of the group's head g at g * Lq + i. A row that attends nothing in a
    chunk gets l = 0, and its O is not written. Else arguments as in `forward`.
    Grid: tiles of BLOCK_M rows x chunks x Hkv x B.
    """
    rows = GROUP * query_len
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = program // tiles % chunks
    key_head = (program // tiles // chunks % key_heads).to(tl.int64)
    b = (program // tiles // chunks // key_heads).to(tl.int64)
    h = tl.where(row < rows, key_head * GROUP + row // query_len, 0)[:, None]
    i = (row % query_len)[:, None]

    batch_index, first_query, first_key, own_queries, key_len = sequence_of(
        packed, b, query_len, key_len
    )
    bounds = limits(band_lower, band_upper, mask, b, own_queries, key_len)
    # rows of no query lie behind all queries, where nothing is attended
    i = tl.where((row < rows)[:, None], i, own_queries)
    ranges = key_blocks(0, bounds, MAX_ROWS, BLOCK_N)
    first, end = tl.maximum(ranges[0], chunk * CHUNK), tl.minimum(ranges[1], (chunk + 1) * CHUNK)
    terms = (mask, bias, alibi, score_factor, cap_factor, bounds)
    dropout = None
    if DROPOUT:
        dropout = (load_seed(seed), threshold.to(tl.uint32), batch_start)

    at = first_query + i
    query_tile = _load_queries(query, batch_index, h, at, i < own_queries, BLOCK_D, HEAD_DIM)
    key = head_of(key, batch_index, key_head, first_key, BLOCK_N, BLOCK_D)
    value = head_of(value, batch_index, key_head, first_key, BLOCK_N, BLOCK_DV)
    state = (
        tl.zeros((BLOCK_M, BLOCK_DV), DTYPE),
        tl.full((BLOCK_M,), -float("inf"), DTYPE),
        tl.zeros((BLOCK_M,), DTYPE),
    )
    tile = (query_tile, key, value, i, first, end, b, h)
    for k0 in range(tl.maximum(ranges[2], chunk * CHUNK), end, BLOCK_N):
        state = attend(
            state,
            tile,
            terms,
            dropout,
            k0,
            True,
            ARBITRARY_MASK,
            False,
            SOFTCAP,
            PRECISION,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_N,
        )

    out_tile, row_max, row_sum = state
    at = ((b * key_heads + key_head) * chunks + chunk) * rows + row
    tl.store(maxima + at, row_max, mask=row < rows)
    tl.store(sums + at, row_sum, mask=row < rows)
    column = tl.arange(0, BLOCK_DV)[None, :]
    attending = ((row < rows) & (row_sum != 0.0))[:, None]
    at = partial + at[:, None] * VALUE_DIM + column
    tl.store(at, out_tile, mask=attending & (column < VALUE_DIM))


@triton.jit(do_not_specialize=[*DO_NOT_SPECIALIZE, "query_rows"])
def combine(
    partial,
    maxima,
    sums,
    out,
    lse,
    sinks,
    packed,
    keep_scale: tl.float64,
    heads,
    key_heads,
    query_len,
    query_rows,
    chunks,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) from what `decode` wrote for every chunk.

    Other arguments as in `decode` and `forward`; BLOCK_N chunks at a time. Grid: Lq x Hq x B.
    """
    program = tl.program_id(0)
    i = program % query_len
    h = program // query_len % heads
    b = (program // query_len // heads).to(tl.int64)
    batch_index, first_query, _, own_queries, _ = sequence_of(packed, b, query_len, 0)
    rows = GROUP * query_len
    # of chunk 0; the next chunk's is `rows` further on
    row = (b * key_heads + h // GROUP) * chunks * rows + h % GROUP * query_len + i
    dtype = partial.dtype.element_ty
    column = tl.arange(0, BLOCK_DV)[None, :]

    # not rounded: only its distance from the maximum is
    sink = tl.full((), -float("inf"), tl.float64)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float64) * LOG2_E
    highest = sink.to(dtype)
    for c0 in range(0, chunks, BLOCK_N):
        c = c0 + tl.arange(0, BLOCK_N)
        some = tl.load(maxima + row + c * rows, mask=c < chunks, other=-float("inf"))
        highest = tl.maximum(highest, tl.max(some, 0))
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    above = sink - shift.to(tl.float64)  # by what rounding takes from it, at most
    total = tl.math.exp2(tl.where(above < 1.0, above, 0.0).to(dtype))
    out_row = tl.zeros((1, BLOCK_DV), dtype)
    for c0 in range(0, chunks, BLOCK_N):
        c = c0 + tl.arange(0, BLOCK_N)
        chunk_max = tl.load(maxima + row + c * rows, mask=c < chunks, other=-float("inf"))
        chunk_sum = tl.load(sums + row + c * rows, mask=c < chunks, other=0.0)
        factor = tl.math.exp2(chunk_max - shift)
        total += tl.sum(chunk_sum * factor, 0)
        at = partial + (row + c * rows)[:, None] * VALUE_DIM + column
        written = (chunk_sum != 0.0)[:, None] & (column < VALUE_DIM)
        tile = tl.load(at, mask=written, other=0.0)
        out_row += tl.sum(tile * factor[:, None], 0, keep_dims=True)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_row *= tl.full((1, 1), keep_scale, dtype) / total
    row_start = batch_index * out[1] + h.to(tl.int64) * out[2] + (first_query + i) * out[3]
    at = out[0] + row_start + column
    columns = tl.where(i < own_queries, VALUE_DIM, 0)
    tl.store(at, out_row.to(out[0].dtype.element_ty), mask=column < columns)
    wide = lse.dtype.element_ty
    row_lse = (shift.to(wide) + tl.log2(total.to(wide))) * LN_2
    row_lse = tl.where(empty, -float("inf"), row_lse)
    at = lse + (batch_index * heads + h) * query_rows + first_query + i
    tl.store(at, row_lse, mask=i < own_queries)
