"""Fields of call records that several launches fill in alike."""

from __future__ import annotations

from torch import Tensor

from ...api.masks import MaskStructure
from ...ops.layout import broadcast_strides
from ..cpu_common.constants import NO_BOUND


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def heads(**tensors: Tensor) -> dict[str, int]:
    """Of (B, H, L, D) tensors with a contiguous last dimension."""
    fields = {}
    for name, tensor in tensors.items():
        fields[name] = tensor.data_ptr()
        fields[f"{name}_batch"], fields[f"{name}_head"], fields[f"{name}_row"], _ = tensor.stride()
    return fields


def pairs(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Of a tensor with an element for each pair of a query and a key."""
    batch, head, row, column = (0, 0, 0, 0) if tensor is None else broadcast_strides(tensor)
    return {
        name: address(tensor),
        f"{name}_batch": batch,
        f"{name}_head": head,
        f"{name}_row": row,
        f"{name}_column": column,
    }


def mask_fields(mask: MaskStructure) -> dict[str, int]:
    """Bounds are clamped to what sums of positions can hold."""
    return {
        "band_lower": -NO_BOUND if mask.band_lower is None else max(mask.band_lower, -NO_BOUND),
        "band_upper": NO_BOUND if mask.band_upper is None else min(mask.band_upper, NO_BOUND),
        "band": address(mask.band),
        "prefix_lengths": address(mask.prefix_lengths),
        "key_lengths": address(mask.key_lengths),
        "query_lengths": address(mask.query_lengths),
        "query_documents": address(mask.query_documents),
        "key_documents": address(mask.key_documents),
        **pairs("dense", mask.dense),
    }


_NO_DROPOUT = {"dropout": 0, "threshold": 0, "seed": 0, "keep_scale": 1.0}


def dropout_fields(dropout_p: float, seed: Tensor | None) -> dict[str, float]:
    """The fields of a call record that say what dropout does."""
    if dropout_p == 0.0 or seed is None:
        return _NO_DROPOUT
    # p = 1 wants 2**32, one more than a word holds; its keep_scale of 0 drops what is left
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return {"dropout": 1, "threshold": threshold, "seed": int(seed), "keep_scale": keep_scale}
