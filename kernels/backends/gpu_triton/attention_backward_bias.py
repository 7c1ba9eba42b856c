"""The gradient of a bias that batch elements, heads, queries or keys share.

    d_bias = sum of dS = P * (M * dP - delta) over all dimensions in which the bias has size 1

A program recomputes dS for everything that its part of the bias is added to, in a fixed order: no
atomics, and no buffer of the scores' size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward_kernels import load_statistics, score_gradients
from .attention_tiles import DO_NOT_SPECIALIZE, head_of, key_blocks, limits, load_rows
from .philox import load_seed


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def backward_dbias(
    query,
    key,
    value,
    grad_out,
    d_bias,
    lse_log2,
    lse_log2_low,
    delta,
    band_lower,
    band_upper,
    mask,
    bias,
    alibi,
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
    batches,
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
    EACH_BATCH: tl.constexpr,
    EACH_HEAD: tl.constexpr,
    EACH_QUERY: tl.constexpr,
    EACH_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d_bias of a shared bias: dS summed over every dimension in which the bias has size 1.

    d_bias (B | 1, Hq | 1, Lq | 1, Lk | 1), contiguous; EACH_... say which are full. A program sums
    one tile of it, in the order batch, head, query, key. Grid: tiles of d_bias.
    """
    key_tiles = tl.cdiv(key_len, BLOCK_N) if EACH_KEY else 1
    query_tiles = tl.cdiv(query_len, BLOCK_M) if EACH_QUERY else 1
    bias_heads = heads if EACH_HEAD else 1
    program = tl.program_id(0)
    j_tile = program % key_tiles
    i_tile = program // key_tiles % query_tiles
    bias_head = program // key_tiles // query_tiles % bias_heads
    bias_batch = program // key_tiles // query_tiles // bias_heads
    j_first, j_end = (j_tile * BLOCK_N, (j_tile + 1) * BLOCK_N) if EACH_KEY else (0, key_len)
    i_first, i_end = (i_tile * BLOCK_M, (i_tile + 1) * BLOCK_M) if EACH_QUERY else (0, query_len)
    h_first, h_end = (bias_head, bias_head + 1) if EACH_HEAD else (0, heads)
    b_first, b_end = (bias_batch, bias_batch + 1) if EACH_BATCH else (0, batches)
    dropout = None
    if DROPOUT:
        dropout = (load_seed(seed), threshold.to(tl.uint32), batch_start, keep_scale)

    # Triton 3.6 forgets, within nested loops, the constants (strides of 1) in the kernel's own
    # tuple arguments; in a tuple that is made before the loops it keeps them.
    fixed = (mask, bias, alibi)
    total = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for batch in range(b_first, b_end):
        b = tl.full((), batch, tl.int64)
        bounds = limits(band_lower, band_upper, fixed[0], b, query_len, key_len)
        terms = (fixed[0], fixed[1], fixed[2], score_factor, cap_factor, bounds)
        for h in range(h_first, h_end):
            wide_h = tl.full((), h, tl.int64)
            key_head = wide_h // (heads // key_heads)
            query_of_head = head_of(query, b, wide_h, 0, BLOCK_M, BLOCK_D)
            grad_of_head = head_of(grad_out, b, wide_h, 0, BLOCK_M, BLOCK_DV)
            key_of_head = head_of(key, b, key_head, 0, BLOCK_N, BLOCK_D)
            value_of_head = head_of(value, b, key_head, 0, BLOCK_N, BLOCK_DV)
            for i0 in range(i_first, i_end, BLOCK_M):
                ranges = key_blocks(i0, bounds, BLOCK_M, BLOCK_N)
                first, end = ranges[0], ranges[1]
                query_tile = load_rows(query_of_head, i0, 0, query_len, True, HEAD_DIM)
                grad_tile = load_rows(grad_of_head, i0, 0, query_len, True, VALUE_DIM)
                i = i0 + tl.arange(0, BLOCK_M)
                statistics = (lse_log2, lse_log2_low, delta, (b * heads + h) * query_len)
                high, low, row_delta = load_statistics(statistics, i0, 0, query_len, True, BLOCK_M)
                for j0 in range(tl.maximum(j_first, ranges[2]), tl.minimum(j_end, end), BLOCK_N):
                    j = j0 + tl.arange(0, BLOCK_N)
                    key_tile = load_rows(key_of_head, j0, first, end, True, HEAD_DIM)
                    value_tile = load_rows(value_of_head, j0, first, end, True, VALUE_DIM)
                    gradients = score_gradients(
                        query_tile,
                        key_tile,
                        grad_tile,
                        value_tile,
                        i[:, None],
                        j[None, :],
                        (j0, b, wide_h),
                        (high[:, None], low[:, None], row_delta[:, None]),
                        terms,
                        dropout,
                        True,
                        False,
                        SOFTCAP,
                        PRECISION,
                    )
                    total += gradients[1]

    # d_bias as (B | 1, Hq | 1, Lq | 1, Lk | 1): the sums over a tile's rows or columns come last
    rows = query_len if EACH_QUERY else 1
    columns = key_len if EACH_KEY else 1
    i = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = j_tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if not EACH_QUERY:
        total = tl.sum(total, 0, keep_dims=True)
        i = tl.zeros((1, 1), tl.int32)
    if not EACH_KEY:
        total = tl.sum(total, 1, keep_dims=True)
        j = tl.zeros((1, 1), tl.int32)
    plane = tl.full((), bias_batch * bias_heads + bias_head, tl.int64) * rows * columns
    at = d_bias + plane + i.to(tl.int64) * columns + j
    tl.store(at, total.to(d_bias.dtype.element_ty), mask=(i < rows) & (j < columns))
