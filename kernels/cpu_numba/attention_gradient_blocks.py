"""One block of scores in the backward pass: its weights, their gradients, and the bias gradient."""

from __future__ import annotations

from .attention_tiles import in_range, random_words
from .elementwise import at_least, exp2
from .jit import jit
from .memory import as_integers32, load, load_integers, pointer, store
from .microkernel import lanes_of
from .simd import cast, select, splat


@jit
def _gradient_of_weight(scores, d_weights, row, lse2, rest, delta, allowed, masked, zeros):
    """One vector of P and of dS, in the place of S and dP."""
    weight = exp2(load(scores + row) - lse2 - rest)
    if masked:
        weight = select(allowed, weight, zeros)
    store(scores + row, weight)
    store(d_weights + row, weight * (load(d_weights + row) - delta))


@jit
def _gradient_of_dropped(
    scores, d_weights, row, lse2, rest, delta, allowed, words, threshold, keep_scale, zeros
):
    """The same with dropout: P * M in the place of S."""
    weight = select(allowed, exp2(load(scores + row) - lse2 - rest), zeros)
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
def _add_bias_gradient(target, row_stride, column_stride, rows, width, keys, d_scores):
    """target[i, j] += dS^T[j, i], summed in float64 over a dimension whose stride is 0."""
    if row_stride == 0:
        for k in range(keys):
            total = 0.0
            for r in range(rows):
                total += d_scores[k * width + r]
            target[k * column_stride] += total
    elif column_stride == 0:
        for r in range(rows):
            total = 0.0
            for k in range(keys):
                total += d_scores[k * width + r]
            target[r * row_stride] += total
    else:
        for r in range(rows):
            for k in range(keys):
                target[r * row_stride + k] += d_scores[k * width + r]


@jit
def add_to_bias(call, b, h, start, k0, rows, width, keys, d_scores):
    offset = b * call.d_bias_batch + h * call.d_bias_head
    offset += start * call.d_bias_row + k0 * call.d_bias_column
    row, column = call.d_bias_row, call.d_bias_column
    if call.d_bias_wide != 0:
        target = pointer(call.d_bias, 0.0) + offset
        _add_bias_gradient(target, row, column, rows, width, keys, d_scores)
    else:
        whole = pointer(call.d_bias, call.zero) + offset
        _add_bias_gradient(whole, row, column, rows, width, keys, d_scores)
