"""The cross entropy of rows of logits z (V columns), and its gradient in their place.

    q_j = (1 - s) * [j = target] + s / V,    p = softmax(z)
    loss = -sum_j q_j log p_j = log(sum exp(z - max z)) - sum_j q_j (z_j - max z)
    gradient = p - q

Differences to the maximum are rounded once, however large the logits. A row of `ignore_index` gives
zeros, one of a target that is no column NaN.
"""

from __future__ import annotations

import math

from ..cpu_common.call_records import CROSS_ENTROPY
from ..cpu_common.constants import LOG2_E
from .call import Kernel, read
from .gemm import lanes_of
from .jit import jit
from .memory import integers_at, load_first, pointer, store_first, take_work
from .rows import row_maximum, set_row
from .vector import add_lanes, cast, lanes_before, select, splat
from .vector_math import exp2


@jit
def _row_loss(row, target, columns, smoothing, with_gradient, zero):
    """The loss of one row; the row becomes its gradient, if that is wanted."""
    lanes = lanes_of(zero)
    one = cast(1.0, zero)
    largest = row_maximum(row, one, columns, zero)
    confidence, share = one - smoothing, smoothing / cast(columns, zero)
    largests, factors = splat(largest), splat(cast(LOG2_E, zero))
    wanted = add_lanes(load_first(row + target, 1)) - largest
    totals = differences = splat(zero)
    for c in range(0, columns, lanes):
        inside = lanes_before(columns - c, zero)
        difference = load_first(row + c, columns - c) - largests
        totals = totals + select(inside, exp2(difference * factors), splat(zero))
        differences = differences + select(inside, difference, splat(zero))
    total = add_lanes(totals)
    if with_gradient != 0:
        inverses, shares = splat(one / total), splat(share)
        for c in range(0, columns, lanes):
            difference = load_first(row + c, columns - c) - largests
            gradient = exp2(difference * factors) * inverses - shares
            if c <= target < c + lanes:
                hit = select(lanes_before(target - c, zero), splat(zero), splat(confidence))
                gradient = gradient - select(lanes_before(target - c + 1, zero), hit, splat(zero))
            store_first(row + c, gradient, columns - c)
    loss = cast(math.log(total), zero)
    # A logit of -inf beside a wanted probability of 0 adds nothing.
    if confidence > zero:
        loss = loss - confidence * wanted
    if smoothing > zero:
        loss = loss - share * add_lanes(differences)
    return loss


def cross_entropy_rows(argument):
    """All rows."""
    call = read(argument)
    zero = call.zero
    counters = integers_at(call.work_counter)
    columns = call.columns
    losses = pointer(call.losses, zero)
    while True:
        first = take_work(counters) * call.task_rows
        if first >= call.rows:
            break
        for index in range(first, min(first + call.task_rows, call.rows)):
            row = pointer(call.logits, call.item) + index * call.logits_row
            target = integers_at(call.target)[index]
            ignored = target == call.ignore_index
            if ignored or target < 0 or target >= columns:
                value = zero if ignored else cast(math.nan, zero)
                losses[index] = value
                if call.with_gradient != 0:
                    set_row(row, 0, columns, value)
            else:
                smoothing = cast(call.label_smoothing, zero)
                losses[index] = _row_loss(row, target, columns, smoothing, call.with_gradient, zero)


ROWS = Kernel(cross_entropy_rows, CROSS_ENTROPY.fields("rows"))
