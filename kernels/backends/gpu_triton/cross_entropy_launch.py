"""Linear cross entropy with the rows of logits by a kernel of Triton's."""

from __future__ import annotations

from torch import Tensor

from ...ops.layout import statistics_dtype
from ..fused_cross_entropy import linear_cross_entropy_by
from . import plans
from .cross_entropy import cross_entropy_rows
from .rows import block_tile


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, with_gradient: bool
) -> Tensor:
    losses: Tensor
    constants = (label_smoothing, ignore_index, with_gradient)
    (losses,) = plans.run(_plan, [logits, target], constants)
    return losses


def _plan(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    with_gradient: bool,
    *,
    launch: plans.Launch,
) -> tuple[Tensor]:
    losses = logits.new_empty(len(logits), dtype=statistics_dtype(logits.dtype))
    rows, columns = logits.shape
    tile = block_tile(columns, logits.dtype)
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    launch(
        cross_entropy_rows,
        [(-(-rows // tile.rows), {**sizes, "num_warps": tile.warps})],
        {
            "logits": logits,
            "logits_row": logits.stride(0),
            "target": target,
            "losses": losses,
            "rows": rows,
            "columns": columns,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "SMOOTHED": label_smoothing > 0.0,
            "WITH_GRADIENT": with_gradient,
        },
    )
    return (losses,)


linear_cross_entropy = linear_cross_entropy_by(cross_entropy)
