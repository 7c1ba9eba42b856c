"""The five products of the attention backward, in the two ways of `attention_products`.

    S^T = K Q^T     dP^T = V dO^T     dV += P^T dO     dK += dS^T Q     dQ^T += K^T dS^T

In pairs, the first two have theirs along the head, the next two along the queries and the last one
along the keys. What a tile of queries brings is rounded once a tile, where Q^T, dO^T, Q and dO lie:
exactly, for it was bfloat16. P and dS are rounded block by block, to pairs of queries and, dS a
second time, to pairs of keys.
"""

from __future__ import annotations

from ..cpu_common.constants import ITEM_COMPUTED
from .attention_products import either, even_rows, interleave_rows, round_pairs
from .attention_rows import readable
from .gemm import VECTORS, lanes_of, multiply
from .gemm_bfloat16 import PAIRED, as_bfloat16, multiply_pairs, store_rounded_row
from .jit import jit
from .memory import bfloat16_at, load, pointer
from .transpose import transpose
from .vector import cast, lanes_before, select, splat

# --- what a tile of queries brings ----------------------------------------------------------------


def _tile_in_floats(
    call, rows, width, query, query_row, grad_out, grad_out_row, query_t, grad_out_t
):
    zero = call.zero
    transpose(query, query_row, query_t, width, rows, call.head_dim, cast(call.scale, zero))
    transpose(grad_out, grad_out_row, grad_out_t, width, rows, call.value_dim, cast(1.0, zero))


def _tile_in_pairs(
    call, rows, width, query, query_row, grad_out, grad_out_row, query_t, grad_out_t
):
    zeros, one = splat(call.zero), cast(1.0, call.zero)
    transpose(query, query_row, query_t, width, rows, call.head_dim, one)
    transpose(grad_out, grad_out_row, grad_out_t, width, rows, call.value_dim, one)
    round_pairs(query_t, call.head_dim, width, zeros)
    round_pairs(grad_out_t, call.value_dim, width, zeros)
    round_pairs(query, rows, query_row, zeros)
    round_pairs(grad_out, rows, grad_out_row, zeros)


@either(_tile_in_floats, _tile_in_pairs)
def load_tile(call, rows, width, query, query_row, grad_out, grad_out_row, query_t, grad_out_t):
    """Q^T and dO^T of a tile's rows; the rows themselves, copies where types are half, in the form
    that `add_products` reads."""
    raise NotImplementedError


# --- S^T and dP^T ---------------------------------------------------------------------------------


def _scores_in_floats(
    call, vectors, keys, key, value, query_t, grad_out_t, scores, d_weights, width, key_rows
):
    zero = call.zero
    value_rows = key_rows + keys * call.head_dim
    at, row = readable(
        call.item_type, call.key, key, call.key_row, keys, call.head_dim, key_rows, zero
    )
    multiply(vectors, keys, call.head_dim, (at, row, 1), (query_t, width), (scores, width), False)
    at, row = readable(
        call.item_type, call.value, value, call.value_row, keys, call.value_dim, value_rows, zero
    )
    left, right = (at, row, 1), (grad_out_t, width)
    multiply(vectors, keys, call.value_dim, left, right, (d_weights, width), False)


@jit
def _product_in_pairs(vectors, keys, dim, rows, row, right, width, result, factor, scratch):
    if dim % 2 != 0:
        rows, row = even_rows(rows, row, keys, dim, scratch)
    left, depth = (rows, row, 2), (dim + 1) // 2
    multiply_pairs(
        vectors, keys, depth, left, (right, width), (result, width), False, result, factor
    )


def _scores_in_pairs(
    call, vectors, keys, key, value, query_t, grad_out_t, scores, d_weights, width, key_rows
):
    zero = call.zero
    _product_in_pairs(
        *(vectors, keys, call.head_dim, bfloat16_at(call.key, zero) + key, call.key_row),
        *(query_t, width, scores, cast(call.scale, zero), key_rows),
    )
    _product_in_pairs(
        *(vectors, keys, call.value_dim, bfloat16_at(call.value, zero) + value, call.value_row),
        *(grad_out_t, width, d_weights, cast(1.0, zero), key_rows),
    )


@either(_scores_in_floats, _scores_in_pairs)
def score_products(
    call, vectors, keys, key, value, query_t, grad_out_t, scores, d_weights, width, key_rows
):
    """scores = call.scale * K Q^T and d_weights = V dO^T of `keys` keys, from the elements `key` of
    k and `value` of v on. `key_rows` is scratch: BLOCK_KEYS rows of D + Dv + lanes elements."""
    raise NotImplementedError


# --- dV, dK and dQ^T ------------------------------------------------------------------------------


def _gradients_in_floats(
    call, vectors, keys, tile, weights, d_scores, spare, ones, key, key_rows, sums, d_query_t, add
):
    rows, width, query, query_row, grad_out, grad_out_row = tile
    d_key, key_columns, d_value, value_columns = sums
    lanes = lanes_of(weights)
    left, right = (weights, width, 1), (grad_out, grad_out_row)
    multiply(value_columns // lanes, keys, rows, left, right, (d_value, value_columns), True)
    left, right = (d_scores, width, 1), (query, query_row)
    multiply(key_columns // lanes, keys, rows, left, right, (d_key, key_columns), True)
    at, row = key_rows, call.head_dim  # as `score_products` left them
    if call.item_type == ITEM_COMPUTED:
        at, row = pointer(call.key, call.zero) + key, call.key_row
    left, right = (at, 1, row), (d_scores, width)
    multiply(vectors, call.head_dim, keys, left, right, (d_query_t, width), add)


@jit
def _round_rows(matrix, rows, width, columns, target, zero):
    """The first `columns` of each row rounded to bfloat16, zeros behind them; returns the row
    stride in elements."""
    lanes = lanes_of(matrix)
    zeros = splat(zero)
    row = (width + PAIRED - 1) // PAIRED * PAIRED
    for r in range(rows):
        for v in range(0, width, PAIRED):
            at = matrix + (r * width + v)
            first = select(lanes_before(columns - v, zero), load(at), zeros)
            second = zeros
            if v + lanes < width:
                inside = lanes_before(columns - v - lanes, zero)
                second = select(inside, load(at + lanes), zeros)
            store_rounded_row(target + (r * row + v) // 2, first, second)
    return row


@jit
def _add_in_pairs(columns, keys, rows, weights, weights_row, right, right_row, ones, target):
    """target += A B for A (keys, rows) and B (rows, columns), both in pairs of rows' elements."""
    lanes = lanes_of(target)
    left = (as_bfloat16(weights), weights_row, 2)
    for at in range(0, columns, VECTORS * lanes):
        multiply_pairs(
            *(min(VECTORS, (columns - at) // lanes), keys, (rows + 1) // 2),
            *(left, (right + at, right_row), (target + at, columns)),
            *(True, ones, ones[0]),
        )


def _gradients_in_pairs(
    call, vectors, keys, tile, weights, d_scores, spare, ones, key, key_rows, sums, d_query_t, add
):
    rows, width, query, query_row, grad_out, grad_out_row = tile
    d_key, key_columns, d_value, value_columns = sums
    row = _round_rows(weights, keys, width, rows, spare, call.zero)
    _add_in_pairs(value_columns, keys, rows, spare, row, grad_out, grad_out_row, ones, d_value)
    row = _round_rows(d_scores, keys, width, rows, spare, call.zero)
    _add_in_pairs(key_columns, keys, rows, spare, row, query, query_row, ones, d_key)
    round_pairs(d_scores, keys, width, splat(call.zero))
    at = bfloat16_at(call.key, call.zero) + key
    words = interleave_rows(at, call.key_row, keys, call.head_dim, key_rows)
    multiply_pairs(
        *(vectors, call.head_dim, (keys + 1) // 2, (as_bfloat16(key_rows), 2, 2 * words)),
        *((d_scores, width), (d_query_t, width), add, ones, ones[0]),
    )


@either(_gradients_in_floats, _gradients_in_pairs)
def add_products(
    call, vectors, keys, tile, weights, d_scores, spare, ones, key, key_rows, sums, d_query_t, add
):
    """dV += P^T dO, dK += dS^T Q and dQ^T = K^T dS^T (+ dQ^T with `add`) of a block of keys.

    tile = (rows, width, query, its row stride, grad_out, its row stride), as `load_tile` left them;
    sums = (d_key, its row stride, d_value, its row stride). `weights` (P) and `d_scores` (dS), both
    (keys, width), are not kept. `spare` has as many elements; `ones` is VECTORS vectors of 1.
    """
    raise NotImplementedError
