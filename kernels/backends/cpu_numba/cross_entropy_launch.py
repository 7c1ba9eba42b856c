"""Linear cross entropy with the rows of logits by a kernel of Numba's."""

from __future__ import annotations

from torch import Tensor

from ...ops.layout import statistics_dtype
from ..fused_cross_entropy import linear_cross_entropy_by
from .cross_entropy import ROWS
from .rows import task_rows


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, with_gradient: bool
) -> Tensor:
    losses = logits.new_empty(len(logits), dtype=statistics_dtype(logits.dtype))
    rows, columns = logits.shape
    task = task_rows(columns)
    ROWS.plan(
        logits.dtype,
        -(-rows // task),
        0,
        {
            "logits": logits.data_ptr(),
            "logits_row": logits.stride(0),
            "target": target.data_ptr(),
            "losses": losses.data_ptr(),
            "rows": rows,
            "columns": columns,
            "task_rows": task,
            "ignore_index": ignore_index,
            "with_gradient": with_gradient,
            "label_smoothing": label_smoothing,
        },
    ).run()
    return losses


linear_cross_entropy = linear_cross_entropy_by(cross_entropy)
