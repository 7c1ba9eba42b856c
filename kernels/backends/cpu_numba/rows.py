"""How the row-wise kernels share rows among tasks and chunks."""

from __future__ import annotations

from ..cpu_common.constants import TASK_ELEMENTS


def task_rows(columns: int) -> int:
    """How many rows of `columns` elements a task takes."""
    return max(1, TASK_ELEMENTS // max(1, columns))


def chunk_rows(rows: int, columns: int) -> int:
    """How many rows a chunk sums into one partial gradient; from the shape alone.

    A chunk costs two rows to write and to read again, so it should have many; but there should be
    chunks for all threads, and no more than 128 sums one after another in one precision.
    """
    return min(128, max(16, rows // 64, task_rows(columns))) // 4 * 4
