"""Rows of q, k, v and their gradients in memory, of the type computed in or of a half type.

`item_type` says which, at run time. So one machine function does all three, and a matrix of a half
type is widened block by block. Addresses are integers, offsets and row strides
count elements.
"""

from __future__ import annotations

import math

from ..cpu_common.constants import ITEM_BFLOAT16, ITEM_COMPUTED, ITEM_FLOAT16
from .gemm import lanes_of
from .jit import jit
from .memory import (
    bfloat16_at,
    float16_at,
    item_size,
    load,
    load_first,
    pointer,
    prefetch,
    prefetch_to_write,
    store,
    store_first,
)
from .vector import add_lanes, multiply_add, splat

_CACHE_LINE = 64  # bytes


@jit
def _widen(source, source_row, target, rows, columns):
    lanes = lanes_of(target)
    whole = columns - columns % lanes
    for r in range(rows):
        at, to = source + r * source_row, target + r * columns
        for c in range(0, whole, lanes):
            store(to + c, load(at + c))
        if whole < columns:
            rest = load_first(at + whole, columns - whole)
            store_first(to + whole, rest, columns - whole)


@jit
def readable(item_type, address, offset, row, rows, columns, scratch, zero):
    """A (rows, columns) matrix as (pointer, row stride): half types are widened into `scratch`."""
    if item_type == ITEM_BFLOAT16:
        _widen(bfloat16_at(address, zero) + offset, row, scratch, rows, columns)
        return scratch, columns
    if item_type == ITEM_FLOAT16:
        _widen(float16_at(address, zero) + offset, row, scratch, rows, columns)
        return scratch, columns
    return pointer(address, zero) + offset, row


@jit
def prefetch_rows(item_type, address, offset, row, rows, columns, zero):
    """Ask for rows that will be read soon, while there is other work."""
    size = item_size(zero) if item_type == ITEM_COMPUTED else 2
    for r in range(rows):
        first = address + (offset + r * row) * size
        for at in range(0, columns * size, _CACHE_LINE):
            prefetch(first + at)


@jit
def prefetch_target(item_type, address, offset, row, rows, columns, zero):
    """Ask for rows that will be written soon."""
    size = item_size(zero) if item_type == ITEM_COMPUTED else 2
    for r in range(rows):
        first = address + (offset + r * row) * size
        for at in range(0, columns * size, _CACHE_LINE):
            prefetch_to_write(first + at)


@jit
def _store_rows(source, source_row, target, target_row, rows, columns, factors):
    lanes = lanes_of(source)
    for r in range(rows):
        for c in range(0, columns, lanes):
            vector = load(source + (r * source_row + c)) * factors
            store_first(target + (r * target_row + c), vector, columns - c)


@jit
def write_rows(item_type, address, offset, row, source, source_row, rows, columns, factor):
    """target = factor * source; rows of `source` are padded to vectors."""
    factors = splat(factor)
    if item_type == ITEM_BFLOAT16:
        target = bfloat16_at(address, factor) + offset
        _store_rows(source, source_row, target, row, rows, columns, factors)
    elif item_type == ITEM_FLOAT16:
        half_target = float16_at(address, factor) + offset
        _store_rows(source, source_row, half_target, row, rows, columns, factors)
    else:
        same = pointer(address, factor) + offset
        _store_rows(source, source_row, same, row, rows, columns, factors)


@jit
def _copy(source, source_row, target, target_row, rows, columns, lse2, zero):
    lanes = lanes_of(target)
    for r in range(rows):
        for c in range(0, target_row, lanes):
            at = target + (r * target_row + c)
            if lse2[r] == math.inf:
                store(at, splat(zero))
            else:
                store(at, load_first(source + (r * source_row + c), columns - c))


@jit
def copy_rows(item_type, address, offset, row, target, target_row, rows, columns, lse2, zero):
    """Rows padded with zeros to `target_row` columns; zeros where lse2 is +inf: a row that attends
    nothing may hold NaN."""
    if item_type == ITEM_BFLOAT16:
        source = bfloat16_at(address, zero) + offset
        _copy(source, row, target, target_row, rows, columns, lse2, zero)
    elif item_type == ITEM_FLOAT16:
        half_source = float16_at(address, zero) + offset
        _copy(half_source, row, target, target_row, rows, columns, lse2, zero)
    else:
        same = pointer(address, zero) + offset
        _copy(same, row, target, target_row, rows, columns, lse2, zero)


@jit
def _dot(a, a_row, b, b_row, rows, columns, totals, zero):
    lanes = lanes_of(zero)
    for r in range(rows):
        total = splat(zero)
        for c in range(0, columns, lanes):
            total = multiply_add(
                load_first(a + (r * a_row + c), columns - c),
                load_first(b + (r * b_row + c), columns - c),
                total,
            )
        totals[r] = add_lanes(total)


@jit
def dot_rows(item_type, address, offset, row, b, b_row, rows, columns, totals, zero):
    """totals[r] = sum_c a[r, c] * b[r, c], with `a` in memory and `b` of the type computed in."""
    if item_type == ITEM_BFLOAT16:
        a = bfloat16_at(address, zero) + offset
        _dot(a, row, b, b_row, rows, columns, totals, zero)
    elif item_type == ITEM_FLOAT16:
        half_a = float16_at(address, zero) + offset
        _dot(half_a, row, b, b_row, rows, columns, totals, zero)
    else:
        same = pointer(address, zero) + offset
        _dot(same, row, b, b_row, rows, columns, totals, zero)
