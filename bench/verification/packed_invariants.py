"""What is said of batches, of the packed sequences of `attention_varlen`."""

from __future__ import annotations

import torch

from ...kernels.testing.cases import Draw, Kind, Shape, attention_case, packed_case
from ...kernels.testing.oracle import PackedCase
from .bits import difference
from .implementations import Implementation

LENGTHS = (70, 5, 130, 33)


def packed_alone(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """A sequence alone gives the bits that it gives among others."""
    kernel, device = implementation.kernel(op), implementation.device
    together = packed(implementation, dtype).run(kernel, device)
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for b in (0, len(LENGTHS) - 1):
        alone = packed(implementation, dtype, b).run(kernel, device)
        rows = slice(starts[b], starts[b + 1])
        expected = {n: t[:, rows] if n == "lse" else t[rows] for n, t in together.items()}
        if (fault := difference(alone, expected)) is not None:
            return fault
    return None


def packed(implementation: Implementation, dtype: torch.dtype, b: int | None = None) -> PackedCase:
    """Sequences of LENGTHS, or one of them."""
    lengths = torch.tensor(LENGTHS)
    size = max(LENGTHS)
    case = attention_case(Kind(), Shape(len(LENGTHS), 4, 2, size, size, 16, 16), Draw(19, dtype))
    if b is not None:
        part = slice(b, b + 1)
        case, lengths = case.of_batch(part), lengths[part]
    made = packed_case(case, lengths, lengths)
    made = made if implementation.with_lse else made.without_lse()
    return made if implementation.backward else made.forward_only()
