"""Tokens drawn at random from what a model expects, in place of the likeliest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from softmax(logits / temperature).

    Of the ``top_k`` likeliest tokens (all when None), and of those the fewest whose probabilities
    add up to ``top_p`` (Holtzman et al., 2020). The same seed draws the same from the same batches.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(f"temperature: expected a number > 0, got {self.temperature}")
        if self.top_k is not None and not (type(self.top_k) is int and self.top_k >= 1):
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")
        if not (type(self.seed) is int and 0 <= self.seed < 2**63):
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)

    def pick(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A token (B,) of each row of logits (B, V)."""
        # float64 and at most 0: any temperature > 0 leaves the likeliest token
        scaled = logits.double()
        scaled = (scaled - scaled.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is None and self.top_p == 1.0:
            return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
        count = min(self.top_k or scaled.shape[-1], scaled.shape[-1])
        top, tokens = scaled.topk(count, dim=-1)  # from the likeliest on
        p = top.softmax(-1)
        before = p.cumsum(-1) - p
        p = p.masked_fill(before >= self.top_p, 0.0)
        drawn = torch.multinomial(p, 1, generator=generator)
        return tokens.gather(1, drawn)[:, 0]
