"""Which tokens of a padded batch are real, and the batch without the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def may_count(mask: Tensor) -> bool:
    """Whether real tokens may be counted, which reads values: no trace, no recording of a graph."""
    recording = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or recording)


@dataclass(frozen=True, eq=False)
class Packing:
    """A batch (B, L, ...) whose real tokens lie one after another: (total, ...).

    Layers of a packed encoder are handed this in the place of their padding mask.

    indices: (total,) int64, where in (B * L) each real token stood. cu_seqlens: (B + 1,) int64,
    where each sequence begins and ends among the real tokens.
    """

    indices: Tensor
    cu_seqlens: Tensor
    batch: int
    length: int

    @classmethod
    def of(cls, real: Tensor) -> Packing:
        """From the bool tensor (B, L) in which True is a real token."""
        batch, length = real.shape
        counts = real.sum(-1, dtype=torch.int64)
        return cls(
            real.flatten().nonzero().squeeze(-1),
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            batch,
            length,
        )

    def real(self) -> Tensor:
        """The bool tensor (B, L) that it was made from."""
        flat = torch.zeros(self.batch * self.length, dtype=torch.bool, device=self.indices.device)
        return flat.index_fill(0, self.indices, True).unflatten(0, (self.batch, self.length))

    def is_right_padded(self) -> bool:
        """Whether the real tokens of each sequence are its first."""
        starts = self.cu_seqlens[:-1]
        counts = self.cu_seqlens[1:] - starts
        first = torch.arange(self.batch, device=starts.device) * self.length - starts
        expected = torch.arange(self.indices.shape[0], device=starts.device)
        return torch.equal(self.indices, expected + first.repeat_interleave(counts))

    def pack(self, padded: Tensor) -> Tensor:
        """(B, L, E) -> (total, E)."""
        return padded.flatten(0, 1).index_select(0, self.indices)

    def unpack(self, packed: Tensor) -> Tensor:
        """(total, E) -> (B, L, E), zeros where there was padding."""
        rows = packed.new_zeros((self.batch * self.length, *packed.shape[1:]))
        return rows.index_copy(0, self.indices, packed).unflatten(0, (self.batch, self.length))
