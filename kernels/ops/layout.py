"""The memory layout of tensors: torch-only, so that fakes and every backend agree on strides."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_heads(like: Tensor, head_dim: int) -> Tensor:
    """An uninitialised (B, H, L, head_dim) with `like`'s dtype, device and order of dimensions.

    Where `like` is a (B, L, H, D) tensor seen as (B, H, L, D), so is the result: joining the heads
    again is then a view, not a copy.
    """
    batch, heads, length, own_dim = like.shape
    _, head_stride, row_stride, _ = like.stride()
    if head_stride >= row_stride and head_dim == own_dim:
        return torch.empty_like(like, memory_format=torch.contiguous_format)  # the fastest way
    if head_stride < row_stride:
        return like.new_empty((batch, length, heads, head_dim)).transpose(1, 2)
    return like.new_empty((batch, heads, length, head_dim))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of mean, rstd, of the public lse and of every sum: float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the lse that the forward pass keeps for the backward pass.

    A rounding of lse moves all weights of its row alike, by eps * |lse| in relative terms: several
    times the error of a weight itself. So it is kept one step wider than the inputs.
    """
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def broadcast_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with 0 for every dimension of size 1."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple([0 if size == 1 else stride for size, stride in pairs])


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
