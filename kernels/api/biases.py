"""Biases that a kernel computes from positions instead of reading them from memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.tracing import same_sizes
from .checks import fail_value, require_device, require_float, shape_text
from .masks import Align, offset_of


@dataclass(frozen=True, eq=False)
class ALiBi:
    """-slopes[h] * |i + offset - j| added to the scores (Press et al. 2022, section 3).

    `slopes` is (Hq,) or (B, Hq), taken as constants; `align` as in `Causal`.
    """

    slopes: Tensor
    align: Align = None

    def __post_init__(self) -> None:
        require_float("ALiBi", "slopes", self.slopes)
        if self.slopes.requires_grad:
            fail_value(
                "ALiBi", "slopes", "a tensor that requires a gradient", "constants (detach them)"
            )

    def parameters(self, shape: tuple[int, int, int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """slopes (B | 1, Hq) and offset (B | 1,) int64, checked for a problem of `shape`."""
        batch, heads = shape[:2]
        slopes = self.slopes.unsqueeze(0) if self.slopes.dim() == 1 else self.slopes
        if not any(same_sizes(slopes.shape, (rows, heads)) for rows in (1, batch)):
            got = f"shape {shape_text(self.slopes.shape)}"
            fail_value("ALiBi", "slopes", got, f"({heads},) or ({batch}, {heads})")
        require_device("ALiBi", "slopes", slopes, "q", like)
        offset = offset_of("ALiBi", self.align, shape, like)
        if not isinstance(offset, Tensor):
            offset = torch.full((1,), offset, dtype=torch.int64, device=like.device)
        return slopes, offset

    def dense(self, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        """The bias (B, Hq, Lq, Lk) that this stands for."""
        slopes, offset = self.parameters((B, Hq, Lq, Lk), self.slopes)
        return alibi_bias(slopes, offset, Lq, Lk).expand(B, Hq, Lq, Lk)


def alibi_bias(slopes: Tensor, offset: Tensor, query_len: int, key_len: int) -> Tensor:
    """slopes (B | 1, Hq), offset (B | 1,) -> (B | 1, Hq, Lq, Lk)."""
    i = torch.arange(query_len, device=slopes.device).view(1, 1, -1, 1)
    j = torch.arange(key_len, device=slopes.device)
    distance = (i + offset.view(-1, 1, 1, 1) - j).abs()
    return -slopes.unsqueeze(-1).unsqueeze(-1) * distance
