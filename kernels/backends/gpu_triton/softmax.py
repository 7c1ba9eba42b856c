"""The kernels of masked softmax, forward and backward.

    weights = softmax(scale * scores) over the keys that the mask allows, 0 elsewhere
    d_scores = scale * weights * (grad - sum(weights * grad)),  grad taken as 0 where weights are 0

The exponentials are 2^((s - max s) * |scale| * log2 e) with s = sign(scale) * scores: the
difference is rounded once, however large the scores. Bands and lengths leave each row one range of
keys, and only that is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Beyond any position, and far from overflow when a position is added.
NO_BOUND = tl.constexpr(2**60)


@triton.jit
def _key_range(ranges, batch, query, keys, present):
    """(first, end) of the keys that bands and lengths allow; none where end <= first.

    ranges: (band_lower, band_upper, band, prefix_lengths, key_lengths, query_lengths); batch and
    query are int64.
    """
    band_lower, band_upper, band, prefix_lengths, key_lengths, query_lengths = ranges
    first, end = query * 0, query * 0 + keys
    if band_lower is not None:
        first = tl.maximum(first, query + band_lower)
    if band_upper is not None:
        end = tl.minimum(end, query + band_upper + 1)
    if band is not None:
        lower = tl.load(band + batch * 2, mask=present, other=0)
        upper = tl.load(band + batch * 2 + 1, mask=present, other=0)
        first = tl.maximum(first, query + tl.maximum(lower, -NO_BOUND))
        end = tl.minimum(end, query + tl.minimum(upper, NO_BOUND) + 1)
    if prefix_lengths is not None:
        end = tl.maximum(end, tl.load(prefix_lengths + batch, mask=present, other=0))
        end = tl.minimum(end, keys)
    if key_lengths is not None:
        end = tl.minimum(end, tl.load(key_lengths + batch, mask=present, other=0))
    if query_lengths is not None:
        used = query < tl.load(query_lengths + batch, mask=present, other=0)
        end = tl.where(used, end, 0)
    return first, end


@triton.jit
def _load_scores(
    scores, pattern, position, sign, start, queries, keys, KEYS: tl.constexpr, dtype: tl.constexpr
):
    """sign * scores of a tile, -inf where the mask forbids; (ROWS, KEYS).

    scores: where each row begins. pattern: (query_documents, key_documents, dense, dense_strides).
    position: (batch, head, query, first, end), each (ROWS, 1); no row has end > keys.
    """
    query_documents, key_documents, dense, dense_strides = pattern
    batch, head, query, first, end = position
    key = start + tl.arange(0, KEYS)[None, :]
    allowed = (key >= first) & (key < end)
    # Whole vectors are read where a part is allowed, so that they can be read as vectors.
    vector = start + tl.arange(0, KEYS)[None, :] // 16 * 16
    read = (vector + 16 > first) & (vector < end) & (key < keys)
    if query_documents is not None:
        at = query_documents + batch * queries + query
        document = tl.load(at, mask=first < end, other=0)
        allowed &= tl.load(key_documents + batch * keys + key, mask=read, other=0) == document
    if dense is not None:
        at = batch * dense_strides[0] + head * dense_strides[1] + query * dense_strides[2]
        allowed &= tl.load(dense + at + key * dense_strides[3], mask=read, other=0) != 0
    score = tl.load(scores + key, mask=read, other=0.0).to(dtype)
    return tl.where(allowed, score * tl.full((1, 1), sign, dtype), -float("inf"))


@triton.jit
def _finite(largest):
    """Nothing to subtract from scores that are all -inf."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _inverse(total):
    """A sum of 0 is one of no key, or of scores that are all -inf: the weights stay 0."""
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _store_tile(target, values, row, start, rows, keys, KEYS: tl.constexpr):
    key = start + tl.arange(0, KEYS)[None, :]
    inside = (row < rows) & (key < keys)
    tl.store(target + row * keys + key, values.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "rows", "band_lower", "band_upper"])
def softmax_forward(
    scores,
    scores_strides,
    weights,
    band_lower,
    band_upper,
    band,
    prefix_lengths,
    key_lengths,
    query_lengths,
    query_documents,
    key_documents,
    dense,
    dense_strides,
    heads,
    queries,
    keys,
    rows,
    sign: tl.float64,
    factor: tl.float64,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS rows a program, read once where they are WHOLE in a tile, else twice in blocks of KEYS.

    scores (B, H, Lq, Lk) with strides for the first three, in elements; weights the same,
    contiguous. The mask as in `masks.MaskStructure`, absent parts None; dense with a stride for
    each dimension, 0 where broadcast. factor = |scale| * log2 e, with the sign of the scale apart.
    """
    dtype: tl.constexpr = tl.float64 if scores.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    present = row < rows
    query, head, batch = row % queries, row // queries % heads, row // queries // heads
    ranges = (band_lower, band_upper, band, prefix_lengths, key_lengths, query_lengths)
    first, end = _key_range(ranges, batch, query, keys, present)
    position = (batch, head, query, first, tl.where(present, end, 0))
    pattern = (query_documents, key_documents, dense, dense_strides)
    scores += batch * scores_strides[0] + head * scores_strides[1] + query * scores_strides[2]
    scale = tl.full((1, 1), factor, dtype)
    if WHOLE:
        score = _load_scores(scores, pattern, position, sign, 0, queries, keys, KEYS, dtype)
        weight = tl.exp2((score - _finite(tl.max(score, axis=1, keep_dims=True))) * scale)
        weight *= _inverse(tl.sum(weight, axis=1, keep_dims=True))
        _store_tile(weights, weight, row, 0, rows, keys, KEYS)
    else:
        largest = tl.full((ROWS, 1), -float("inf"), dtype)
        total = tl.zeros((ROWS, 1), dtype)
        for start in range(0, keys, KEYS):
            score = _load_scores(scores, pattern, position, sign, start, queries, keys, KEYS, dtype)
            grown = tl.maximum(largest, tl.max(score, axis=1, keep_dims=True))
            weight = tl.exp2((score - _finite(grown)) * scale)
            total *= tl.exp2((largest - _finite(grown)) * scale)
            total += tl.sum(weight, axis=1, keep_dims=True)
            largest = grown
        largest, inverse = _finite(largest), _inverse(total)
        for start in range(0, keys, KEYS):
            score = _load_scores(scores, pattern, position, sign, start, queries, keys, KEYS, dtype)
            weight = tl.exp2((score - largest) * scale) * inverse
            _store_tile(weights, weight, row, start, rows, keys, KEYS)


@triton.jit
def _load_pair(pair, row, start, rows, keys, KEYS: tl.constexpr, dtype: tl.constexpr):
    """A tile of the weights and of their gradient, which is taken as 0 where the weight is.

    pair: (weights, weights_row, grad, grad_row).
    """
    weights, weights_row, grad, grad_row = pair
    key = start + tl.arange(0, KEYS)[None, :]
    inside = (row < rows) & (key < keys)
    weight = tl.load(weights + row * weights_row + key, mask=inside, other=0.0).to(dtype)
    d_weight = tl.load(grad + row * grad_row + key, mask=inside, other=0.0).to(dtype)
    return weight, tl.where(weight == 0.0, 0.0, d_weight)


@triton.jit(do_not_specialize=["rows"])
def softmax_backward(
    weights,
    weights_row,
    grad,
    grad_row,
    d_scores,
    keys,
    rows,
    scale: tl.float64,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """weights, grad, d_scores (rows, keys); weights and grad with a row stride, in elements.

    ROWS rows a program, read once where they are WHOLE in a tile, else twice in blocks of KEYS.
    """
    dtype: tl.constexpr = tl.float64 if weights.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    factor = tl.full((1, 1), scale, dtype)
    pair = (weights, weights_row, grad, grad_row)
    if WHOLE:
        weight, d_weight = _load_pair(pair, row, 0, rows, keys, KEYS, dtype)
        dot = tl.sum(weight * d_weight, axis=1, keep_dims=True)
        _store_tile(d_scores, factor * weight * (d_weight - dot), row, 0, rows, keys, KEYS)
    else:
        products = tl.zeros((ROWS, KEYS), dtype)
        for start in range(0, keys, KEYS):
            weight, d_weight = _load_pair(pair, row, start, rows, keys, KEYS, dtype)
            products += weight * d_weight
        dot = tl.sum(products, axis=1, keep_dims=True)
        for start in range(0, keys, KEYS):
            weight, d_weight = _load_pair(pair, row, start, rows, keys, KEYS, dtype)
            d_score = factor * weight * (d_weight - dot)
            _store_tile(d_scores, d_score, row, start, rows, keys, KEYS)
