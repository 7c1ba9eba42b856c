"""Random tensors, the same in every run, and what transforms leave of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rand(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def left_by(transform: Callable[..., Any], value: Tensor) -> Tensor:
    """What a transform wrapped, after it has ended."""
    kept: list[Tensor] = []

    def keep(wrapped: Tensor) -> Tensor:
        kept.append(wrapped)
        return wrapped.sum()

    transform(keep)(value)
    return kept[0]
