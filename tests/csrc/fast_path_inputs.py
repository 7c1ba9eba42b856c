"""What the tests of plain calls, of attention and of norms, give them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import tensors

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
rand = functools.partial(tensors.rand, dtype=torch.float32)


def left_by_transforms(value: Tensor) -> list[Tensor]:
    """Plain tensors by their type, whose memory is a transform's that has ended."""
    kept = [tensors.left_by(transform, value) for transform in (torch.func.grad, torch.func.vmap)]
    assert all(type(wrapped) is Tensor for wrapped in kept)
    return kept
