"""One block of scores in the backward pass: its weights, their gradients, and the bias gradient."""

from __future__ import annotations

from ..cpu_common.constants import (
    BIAS_GRAD_STORE,
    BIAS_GRAD_SUM,
    BIAS_GRAD_SUM_WIDE,
    ITEM_BFLOAT16,
    ITEM_COMPUTED,
    ITEM_FLOAT16,
)
from .attention_tiles import in_range, prefetch_block, random_words
from .gemm import lanes_of
from .jit import jit
from .memory import (
    as_integers32,
    bfloat16_at,
    float16_at,
    load,
    load_first,
    load_integers,
    pointer,
    store,
    store_first,
)
from .philox import at_least
from .transpose import add_transposed, transpose_block
from .vector import cast, select, splat
from .vector_math import exp2_difference


@jit
def _gradient_of_weight(scores, d_weights, row, lse2, rest, delta, allowed, masked, zeros):
    """One vector of P and of dS, in the place of S and dP."""
    weight = exp2_difference(load(scores + row), lse2, rest)
    if masked:
        weight = select(allowed, weight, zeros)
    store(scores + row, weight)
    store(d_weights + row, weight * (load(d_weights + row) - delta))


@jit
def _gradient_of_dropped(
    scores, d_weights, row, lse2, rest, delta, allowed, words, threshold, keep_scale, zeros
):
    """The same with dropout: P * M in the place of S."""
    weight = select(allowed, exp2_difference(load(scores + row), lse2, rest), zeros)
    keep = select(at_least(words, threshold), keep_scale, zeros)
    store(scores + row, weight * keep)
    store(d_weights + row, weight * (load(d_weights + row) * keep - delta))


@jit
def gradient_block(
    call, b, h, start, masked, k0, keys, width, scores, d_weights, lse2, rest, delta, first, last
):
    """P (or P * M) in the place of the block's scores, and dS in the place of its dP."""
    zero = call.zero
    lanes = lanes_of(zero)
    zeros = splat(zero)
    for v in range(0, width, lanes):
        row_lse, row_rest, row_delta = load(lse2 + v), load(rest + v), load(delta + v)
        low = load_integers(as_integers32(first) + v, zero)
        high = load_integers(as_integers32(last) + v, zero)
        if call.dropout == 0:
            for k in range(keys):
                allowed = in_range(k0 + k, low, high, zero)
                _gradient_of_weight(
                    scores,
                    d_weights,
                    k * width + v,
                    row_lse,
                    row_rest,
                    row_delta,
                    allowed,
                    masked,
                    zeros,
                )
            continue
        keep_scale = splat(cast(call.keep_scale, zero))
        for group in range(k0 // 4, (k0 + keys + 3) // 4):
            w0, w1, w2, w3 = random_words(call, b, h, start, v, group)
            for word in range(4):
                k = 4 * group + word - k0
                if 0 <= k < keys:
                    words = w0
                    if word == 1:
                        words = w1
                    elif word == 2:
                        words = w2
                    elif word == 3:
                        words = w3
                    allowed = in_range(k0 + k, low, high, zero)
                    _gradient_of_dropped(
                        scores,
                        d_weights,
                        k * width + v,
                        row_lse,
                        row_rest,
                        row_delta,
                        allowed,
                        words,
                        call.threshold,
                        keep_scale,
                        zeros,
                    )


@jit
def _sum_over_rows(target, columns, rows, width, keys, d_scores):
    """target[j] += sum_i dS^T[j, i]"""
    for k in range(keys):
        total = 0.0
        for r in range(rows):
            total += d_scores[k * width + r]
        target[k * columns] += total


@jit
def _sum_over_columns(target, row, rows, width, keys, d_scores):
    """target[i] += sum_j dS^T[j, i]"""
    for r in range(rows):
        total = 0.0
        for k in range(keys):
            total += d_scores[k * width + r]
        target[r * row] += total


@jit
def _store_part(kind, item_type, address, at, row, rows, columns, d_scores, width, turned, zero):
    """Up to LANES x LANES pairs of dS^T, turned over, into d_bias or added to it."""
    lanes = lanes_of(d_scores)
    one = cast(1.0, zero)
    whole = rows == lanes and columns == lanes
    stores = kind == BIAS_GRAD_STORE
    if whole and stores and item_type == ITEM_COMPUTED:
        transpose_block(d_scores, width, pointer(address, zero) + at, row, one)
    elif whole and stores and item_type == ITEM_BFLOAT16:
        transpose_block(d_scores, width, bfloat16_at(address, zero) + at, row, one)
    elif whole and kind == BIAS_GRAD_SUM:
        add_transposed(d_scores, width, pointer(address, zero) + at, row, one)
    else:
        transpose_block(d_scores, width, turned, lanes, one)
        for r in range(rows):
            part = turned + r * lanes
            if kind == BIAS_GRAD_SUM_WIDE:
                total = pointer(address, 0.0) + (at + r * row)
                for c in range(columns):
                    total[c] += part[c]
            elif stores and item_type == ITEM_BFLOAT16:
                store_first(bfloat16_at(address, zero) + (at + r * row), load(part), columns)
            elif stores and item_type == ITEM_FLOAT16:
                store_first(float16_at(address, zero) + (at + r * row), load(part), columns)
            else:
                same = pointer(address, zero) + (at + r * row)
                value = load(part)
                if kind == BIAS_GRAD_SUM:
                    value = value + load_first(same, columns)
                store_first(same, value, columns)


@jit
def store_bias_gradient(call, b, h, start, k0, rows, width, keys, d_scores, turned):
    """d_bias = dS of a tile's block, or d_bias += dS where pairs share an element of the bias.

    `turned` is scratch of LANES x LANES elements.
    """
    kind, row, zero = call.d_bias_kind, call.d_bias_row, call.zero
    offset = b * call.d_bias_batch + h * call.d_bias_head
    offset += start * row + k0 * call.d_bias_column
    if row == 0 and kind == BIAS_GRAD_SUM_WIDE:
        total = pointer(call.d_bias, 0.0) + offset
        _sum_over_rows(total, call.d_bias_column, rows, width, keys, d_scores)
        return
    if call.d_bias_column == 0 and kind == BIAS_GRAD_SUM_WIDE:
        total = pointer(call.d_bias, 0.0) + offset
        _sum_over_columns(total, row, rows, width, keys, d_scores)
        return
    lanes = lanes_of(d_scores)
    if kind == BIAS_GRAD_SUM:
        prefetch_block(ITEM_COMPUTED, call.d_bias, offset, row, rows, call.key_len - k0, zero)
    for v in range(0, rows, lanes):
        for k in range(0, keys, lanes):
            _store_part(
                *(
                    kind,
                    call.d_bias_item_type,
                    call.d_bias,
                    offset + v * row + k,
                    row,
                    min(lanes, rows - v),
                ),
                *(min(lanes, keys - k), d_scores + (k * width + v), width, turned, zero),
            )
