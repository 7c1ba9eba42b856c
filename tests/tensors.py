"""Random tensors, the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def rand(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
