"""What the row-wise kernels need to know of a tensor: where its rows lie and how to share them."""

from __future__ import annotations

from torch import Tensor

# Elements a task takes at least: enough work to pay for waking a thread.
_TASK_ELEMENTS = 16384


def count_rows(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


def rows_of(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor and its row stride in elements; a copy only where rows have no common stride.

    Rows have one when the last dimension is contiguous and the others collapse into one.
    """
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    stride = _row_stride(tensor)
    return (tensor.contiguous(), tensor.shape[-1]) if stride is None else (tensor, stride)


def _row_stride(tensor: Tensor) -> int | None:
    *leading, columns = zip(tensor.shape, tensor.stride(), strict=True)
    if columns[0] > 1 and columns[1] != 1:
        return None
    row_stride, expected = 0, None
    for size, stride in reversed(leading):
        if size == 1:
            continue
        if expected is None:
            row_stride = stride
        elif stride != expected:
            return None
        expected = stride * size
    return row_stride


def task_rows(columns: int) -> int:
    """How many rows of `columns` elements a task takes."""
    return max(1, _TASK_ELEMENTS // max(1, columns))


def chunk_rows(rows: int, columns: int) -> int:
    """How many rows a chunk sums into one partial gradient; from the shape alone.

    A chunk costs two rows to write and to read again, so it should have many; but there should be
    chunks for all threads, and no more than 128 sums one after another in one precision.
    """
    return min(128, max(16, rows // 64, task_rows(columns))) // 4 * 4
