"""Masked softmax: arguments checked, one op called."""

from __future__ import annotations

from torch import Tensor

from ..backends import dispatch
from ..ops import operators
from ..ops.problem import SoftmaxProblem
from .checks import fail_value, require_float, require_number, shape_text
from .masks import Mask, as_mask, structure_of


def masked_softmax(
    scores: Tensor, mask: Mask | Tensor | None = None, scale: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """softmax(scale * scores) over the last dimension, over the positions that `mask` allows.

    Args:
        scores: (B, H, Lq, Lk), or fewer leading dimensions (taken as 1).
        mask: as in `attention`; a row that allows nothing gives zeros.
        scale: multiplies the scores.

    Returns:
        weights, shape and dtype of scores; statistics in float32 or wider.
    """
    require_float("masked_softmax", "scores", scores)
    if not 1 <= scores.dim() <= 4:
        fail_value(
            "masked_softmax", "scores", f"shape {shape_text(scores.shape)}", "1 to 4 dimensions"
        )
    scale = require_number("masked_softmax", "scale", scale)
    view = scores
    if scores.dim() == 3:
        view = scores.unsqueeze(1)
    elif scores.dim() < 3:
        view = scores.reshape((1,) * (4 - scores.dim()) + tuple(scores.shape))
    batch, heads, query_len, key_len = view.shape
    structure = structure_of(
        as_mask("masked_softmax", mask), (batch, heads, query_len, key_len), scores
    )
    weights = operators.masked_softmax(
        SoftmaxProblem(view, structure, scale), dispatch.check_name("masked_softmax", backend)
    )
    return weights.view(scores.shape)
