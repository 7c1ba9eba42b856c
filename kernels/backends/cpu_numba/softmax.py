"""The kernels of masked softmax, forward and backward: keys in the lanes, row by row.

    weights = softmax(scale * scores) over the keys that the mask allows, 0 elsewhere
    d_scores = scale * weights * (grad - sum(weights * grad)),  grad taken as 0 where weights are 0

The exponentials are 2^((s - max s) * |scale| * log2 e) with s = sign(scale) * scores: the
difference is rounded once, however large the scores. Bands, lengths and documents leave each row
one range of keys, and only that is read; within it documents and a dense mask turn what they forbid
into -inf. Half types are widened in registers, and a row of them is worked on in float32 scratch.
"""

from __future__ import annotations

import math

from ..cpu_common.call_records import SOFTMAX
from ..cpu_common.constants import LOG2_E, NO_BOUND
from .call import Kernel, read
from .gemm import lanes_of
from .jit import jit
from .memory import (
    bytes_at,
    integers_at,
    item_size,
    load,
    load_first,
    load_first_equal,
    load_first_flags,
    load_flags,
    pointer,
    store,
    store_first,
    take_work,
)
from .rows import row_maximum, set_row
from .vector import add_lanes, any_lane, cast, lanes_before, multiply_add, select, splat
from .vector_math import exp2


@jit
def _key_range(call, batch, query):
    """(first, end) of the keys that bands and lengths allow; first == end when there are none."""
    lower, upper, end = call.band_lower, call.band_upper, call.keys
    if call.band != 0:
        band = integers_at(call.band) + batch * 2
        lower, upper = max(lower, band[0]), min(upper, band[1])
    if call.key_lengths != 0:
        end = min(end, integers_at(call.key_lengths)[batch])
    if call.query_lengths != 0 and query >= integers_at(call.query_lengths)[batch]:
        end = 0
    first = max(0, query + max(lower, -NO_BOUND))
    prefix = 0
    if call.prefix_lengths != 0:
        prefix = integers_at(call.prefix_lengths)[batch]
    end = max(0, min(end, max(query + min(upper, NO_BOUND) + 1, prefix)))
    return min(first, end), end


@jit
def _document_range(ids, document, first, end, zero):
    """(first, end) without the keys of other documents before the first and behind the last own."""
    lanes = lanes_of(zero)
    while first < end and not any_lane(load_first_equal(ids + first, document, zero, end - first)):
        first += lanes
    while end - lanes > first and not any_lane(
        load_first_equal(ids + (end - lanes), document, zero, lanes)
    ):
        end -= lanes
    return min(first, end), end


@jit
def _mask_row(scores, flags, sign, target, keys, zero):
    """target = sign * scores where the flags are true, -inf elsewhere."""
    lanes = lanes_of(zero)
    signs, forbidden = splat(sign), splat(cast(-math.inf, zero))
    rest = keys % lanes
    for c in range(0, keys - rest, lanes):
        allowed = load_flags(flags + c, zero)
        store(target + c, select(allowed, load(scores + c) * signs, forbidden))
    if rest > 0:
        c = keys - rest
        allowed = load_first_flags(flags + c, zero, rest)
        result = select(allowed, load_first(scores + c, rest) * signs, forbidden)
        store_first(target + c, result, rest)


@jit
def _mask_documents(scores, ids, document, sign, target, keys, zero):
    """target = sign * scores where the ids are the document's, -inf elsewhere."""
    lanes = lanes_of(zero)
    signs, forbidden = splat(sign), splat(cast(-math.inf, zero))
    for c in range(0, keys, lanes):
        rest = keys - c
        allowed = load_first_equal(ids + c, document, zero, rest)
        result = select(allowed, load_first(scores + c, rest) * signs, forbidden)
        store_first(target + c, result, rest)


@jit
def _exponentials(row, sign, largest, factor, target, keys, zero):
    """target = 2^((sign * row - largest) * factor); returns their sum."""
    lanes = lanes_of(zero)
    signs, largests, factors = splat(sign), splat(largest), splat(factor)
    total = splat(zero)
    rest = keys % lanes
    for c in range(0, keys - rest, lanes):
        weight = exp2((load(row + c) * signs - largests) * factors)
        store(target + c, weight)
        total = total + weight
    if rest > 0:
        c = keys - rest
        weight = exp2((load_first(row + c, rest) * signs - largests) * factors)
        store_first(target + c, weight, rest)
        total = total + select(lanes_before(rest, zero), weight, splat(zero))
    return add_lanes(total)


@jit
def _scale_row(row, factor, target, keys):
    """target = row * factor."""
    lanes = lanes_of(factor)
    factors = splat(factor)
    rest = keys % lanes
    for c in range(0, keys - rest, lanes):
        store(target + c, load(row + c) * factors)
    if rest > 0:
        c = keys - rest
        store_first(target + c, load_first(row + c, rest) * factors, rest)


@jit
def _weigh_row(row, sign, work, factor, target, first, end, keys, zero):
    """target = softmax(row[first:end] * sign * factor), 0 elsewhere; `row` and `work` from 0 on."""
    largest = row_maximum(row + first, sign, end - first, zero)
    if largest == -math.inf:
        largest = zero
    total = _exponentials(row + first, sign, largest, factor, work + first, end - first, zero)
    # A sum of 0 is one of no key, or of scores that are all -inf: the weights stay 0.
    one = cast(1.0, zero)
    inverse = one if total == zero else one / total
    _scale_row(work + first, inverse, target + first, end - first)
    # Where a score is NaN the whole row is, as in the equation.
    set_row(target, 0, first, inverse * zero)
    set_row(target, end, keys, inverse * zero)


def forward(argument):
    """All rows. Scratch: a row, where an item is narrower than what is computed in."""
    call = read(argument)
    zero = call.zero
    counters = integers_at(call.work_counter)
    thread = take_work(counters + 1)
    queries, keys = call.queries, call.keys
    # A scale of 0 is a sign of 0: -inf must not be multiplied by it once it stands for 'masked'.
    sign, factor = zero, cast(1.0, zero)
    if call.scale != 0.0:
        sign = cast(math.copysign(1.0, call.scale), zero)
        factor = cast(abs(call.scale) * LOG2_E, zero)
    one = cast(1.0, zero)
    while True:
        first_row = take_work(counters) * call.task_rows
        if first_row >= call.rows:
            break
        query, head = first_row % queries, first_row // queries
        batch, head = head // call.heads, head % call.heads
        for index in range(first_row, min(first_row + call.task_rows, call.rows)):
            offset = batch * call.scores_batch + head * call.scores_head
            row = pointer(call.scores, call.item) + (offset + query * call.scores_query)
            target = pointer(call.weights, call.item) + index * keys
            address = call.weights + index * keys * item_size(call.item)
            if item_size(call.item) < item_size(zero):
                address = call.scratch + thread * call.scratch_bytes
            work = pointer(address, zero)
            first, end = _key_range(call, batch, query)
            masked = False
            if call.query_documents != 0:
                document = integers_at(call.query_documents)[batch * queries + query]
                ids = integers_at(call.key_documents) + batch * keys
                first, end = _document_range(ids, document, first, end, zero)
                _mask_documents(
                    row + first, ids + first, document, sign, work + first, end - first, zero
                )
                masked = True
            if call.dense != 0:
                offset = batch * call.dense_batch + head * call.dense_head
                flags = bytes_at(call.dense) + (offset + query * call.dense_row)
                if call.dense_column != 1:
                    if flags[0] == 0:
                        end = first
                elif masked:
                    _mask_row(work + first, flags + first, one, work + first, end - first, zero)
                else:
                    _mask_row(row + first, flags + first, sign, work + first, end - first, zero)
                    masked = True
            if masked:
                _weigh_row(work, one, work, factor, target, first, end, keys, zero)
            else:
                _weigh_row(row, sign, work, factor, target, first, end, keys, zero)
            query += 1
            if query == queries:
                query, head = 0, head + 1
            if head == call.heads:
                head, batch = 0, batch + 1


def backward(argument):
    """All rows of d_scores."""
    call = read(argument)
    zero = call.zero
    counters = integers_at(call.work_counter)
    keys = call.keys
    lanes = lanes_of(zero)
    scales, zeros = splat(cast(call.scale, zero)), splat(zero)
    while True:
        first_row = take_work(counters) * call.task_rows
        if first_row >= call.rows:
            break
        for index in range(first_row, min(first_row + call.task_rows, call.rows)):
            weights = pointer(call.weights, call.item) + index * call.weights_row
            grad = pointer(call.grad, call.item) + index * call.grad_row
            target = pointer(call.d_scores, call.item) + index * keys
            s0 = s1 = zeros
            c = 0
            while c + 2 * lanes <= keys:
                w0, w1 = load(weights + c), load(weights + (c + lanes))
                g0 = select(w0 == zeros, zeros, load(grad + c))
                g1 = select(w1 == zeros, zeros, load(grad + (c + lanes)))
                s0, s1 = multiply_add(w0, g0, s0), multiply_add(w1, g1, s1)
                c += 2 * lanes
            while c < keys:
                w0 = load_first(weights + c, keys - c)
                g0 = select(w0 == zeros, zeros, load_first(grad + c, keys - c))
                s0 = multiply_add(w0, g0, s0)
                c += lanes
            dots = splat(add_lanes(s0 + s1))
            rest = keys % lanes
            for c in range(0, keys - rest, lanes):
                w0 = load(weights + c)
                g0 = select(w0 == zeros, zeros, load(grad + c))
                store(target + c, scales * w0 * (g0 - dots))
            if rest > 0:
                c = keys - rest
                w0 = load_first(weights + c, rest)
                g0 = select(w0 == zeros, zeros, load_first(grad + c, rest))
                store_first(target + c, scales * w0 * (g0 - dots), rest)


FORWARD = Kernel(forward, SOFTMAX.fields("forward"))
BACKWARD = Kernel(backward, SOFTMAX.fields("backward"))
