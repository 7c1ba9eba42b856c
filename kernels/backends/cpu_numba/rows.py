"""What the row-wise kernels share: how rows are divided among tasks, and passes over a row."""

from __future__ import annotations

import math

from ..cpu_common.constants import TASK_ELEMENTS
from .gemm import lanes_of
from .jit import jit
from .memory import load, load_first, store_first
from .vector import cast, lanes_before, largest_lane, maximum, select, splat


def task_rows(columns: int) -> int:
    """How many rows of `columns` elements a task takes."""
    return max(1, TASK_ELEMENTS // max(1, columns))


def chunk_rows(rows: int, columns: int) -> int:
    """How many rows a chunk sums into one partial gradient; from the shape alone.

    A chunk costs two rows to write and to read again, so it should have many; but there should be
    chunks for all threads, and no more than 128 sums one after another in one precision.
    """
    return min(128, max(16, rows // 64, task_rows(columns))) // 4 * 4


@jit
def row_maximum(row, sign, keys, zero):
    """The largest sign * row; -inf of nothing; NaN is passed over, the exponentials keep it."""
    lanes = lanes_of(zero)
    signs = splat(sign)
    m0 = m1 = m2 = m3 = splat(cast(-math.inf, zero))
    c = 0
    while c + 4 * lanes <= keys:
        m0 = maximum(load(row + c) * signs, m0)
        m1 = maximum(load(row + (c + lanes)) * signs, m1)
        m2 = maximum(load(row + (c + 2 * lanes)) * signs, m2)
        m3 = maximum(load(row + (c + 3 * lanes)) * signs, m3)
        c += 4 * lanes
    while c < keys:
        allowed = lanes_before(keys - c, zero)
        m0 = maximum(select(allowed, load_first(row + c, keys - c) * signs, m0), m0)
        c += lanes
    return largest_lane(maximum(maximum(m0, m1), maximum(m2, m3)))


@jit
def set_row(target, first, end, value):
    """target[first:end] = value."""
    for c in range(first, end, lanes_of(value)):
        store_first(target + c, splat(value), end - c)
