"""The cross entropy of rows of logits z (V columns), and its gradient in their place.

    q_j = (1 - s) * [j = target] + s / V,    p = softmax(z)
    loss = -sum_j q_j log p_j = log(sum exp(z - max z)) - sum_j q_j (z_j - max z)
    gradient = p - q

Differences to the maximum are rounded once, however large the logits. A row of `ignore_index` gives
zeros, one of a target that is no column NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(logits, row, start, rows, columns, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Where a block of columns lies, which of it there is, and its logits, -inf elsewhere."""
    column = start + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(logits + column, mask=inside, other=-float("inf"))
    return column, inside, value.to(dtype)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_rows(
    logits,
    logits_row,
    target,
    losses,
    rows,
    columns,
    ignore_index,
    label_smoothing: tl.float64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """ROWS rows a program, in blocks of COLUMNS: their maximum, their sums, their gradients.

    logits (rows, columns) with a row stride, in elements; target (rows,) int64; losses (rows,).
    """
    dtype: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    present = row < rows
    word = tl.load(target + row, mask=present, other=0)
    ignored = word == ignore_index
    known = (word >= 0) & (word < columns)
    logits += row * logits_row
    wanted = tl.load(logits + word, mask=present & known, other=0.0).to(dtype)

    block = tl.full((ROWS, COLUMNS), -float("inf"), dtype)
    for start in range(0, columns, COLUMNS):
        _, _, value = _load(logits, row, start, rows, columns, COLUMNS, dtype)
        block = tl.maximum(block, value)
    largest = tl.where(present, tl.max(block, axis=1, keep_dims=True), 0.0)

    totals = tl.zeros((ROWS, COLUMNS), dtype)
    differences = tl.zeros((ROWS, COLUMNS), dtype)
    for start in range(0, columns, COLUMNS):
        _, inside, value = _load(logits, row, start, rows, columns, COLUMNS, dtype)
        difference = tl.where(inside, value - largest, 0.0)
        totals += tl.where(inside, tl.exp2(difference * _LOG2_E), 0.0)
        if SMOOTHED:
            differences += difference
    total = tl.where(present, tl.sum(totals, axis=1, keep_dims=True), 1.0)

    smoothing = tl.full((1, 1), label_smoothing, dtype)
    confidence = 1.0 - smoothing
    share = smoothing / columns
    loss = tl.log(total)
    # A logit of -inf beside a wanted probability of 0 adds nothing.
    loss -= tl.where(confidence > 0.0, confidence * (wanted - largest), 0.0)
    if SMOOTHED:
        loss -= share * tl.sum(differences, axis=1, keep_dims=True)
    loss = tl.where(known, loss, float("nan"))
    tl.store(losses + row, tl.where(ignored, 0.0, loss), mask=present)

    if WITH_GRADIENT:
        inverse = 1.0 / total
        for start in range(0, columns, COLUMNS):
            column, inside, value = _load(logits, row, start, rows, columns, COLUMNS, dtype)
            p = tl.exp2((value - largest) * _LOG2_E) * inverse
            gradient = p - tl.where(column == word, share + confidence, share)
            gradient = tl.where(ignored, 0.0, tl.where(known, gradient, float("nan")))
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)
