"""Sentences one after another in one tensor, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the n sentences of a packed tensor of T tokens are."""

    starts: Tensor  # (n + 1,) int64: each sentence's first token, and T
    positions: Tensor  # (T,) int64: each token's place in its sentence
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        return cls(torch.from_numpy(starts), torch.from_numpy(positions), max(lengths, default=0))

    def to(self, device: torch.device) -> Packing:
        return Packing(self.starts.to(device), self.positions.to(device), self.longest)


class PackedAttention(NamedTuple):
    """Which keys each query may attend: those of its own sentence, up to itself where causal."""

    queries: Packing
    keys: Packing
    causal: bool


@dataclass(frozen=True)
class PackedBatch:
    """The tokens of a batch's sentences, as in `data.Batch` but packed."""

    source: Tensor  # (Ts,) int64
    source_packing: Packing
    target_in: Tensor  # (Tt,) int64
    target_out: Tensor  # (Tt,) int64
    target_packing: Packing
    source_padding: int = 0  # PAD tokens at the end of each side
    target_padding: int = 0

    @property
    def target_tokens(self) -> int:
        return len(self.target_out) - self.target_padding

    @property
    def tokens(self) -> int:
        """Source and target tokens without padding."""
        return len(self.source) - self.source_padding + self.target_tokens

    def to(self, device: torch.device) -> PackedBatch:
        counts = {"source_padding", "target_padding"}
        moved = {name: each.to(device) for name, each in vars(self).items() if name not in counts}
        return replace(self, **moved)


def pack(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Packing]:
    """Token ids one after another (T,), and where each sequence is."""
    tokens = np.concatenate([np.asarray(each, dtype=np.int64) for each in sequences])
    return torch.from_numpy(tokens), Packing.of([len(each) for each in sequences])
