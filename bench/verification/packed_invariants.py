"""The invariants of `attention_varlen`: what is said of batches, of packed sequences."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...kernels.testing.cases import Draw, Kind, Shape, attention_case, packed_case
from ...kernels.testing.oracle import PackedCase
from .bits import difference, on_all_threads
from .implementations import Implementation

LENGTHS = (70, 5, 130, 33)


def packed_again(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    case = _packed(implementation, dtype)
    kernel, device = implementation.kernel(op), implementation.device
    first = case.run(kernel, device)
    return difference(case.run(kernel, device), first)


def packed_any_threads(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    case = _packed(implementation, dtype)
    return on_all_threads(partial(case.run, implementation.kernel(op), implementation.device))


def packed_alone(implementation: Implementation, op: str, dtype: torch.dtype) -> str | None:
    """A sequence alone gives the bits that it gives among others."""
    kernel, device = implementation.kernel(op), implementation.device
    together = _packed(implementation, dtype).run(kernel, device)
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for b in (0, len(LENGTHS) - 1):
        alone = _packed(implementation, dtype, b).run(kernel, device)
        rows = slice(starts[b], starts[b + 1])
        expected = {n: t[:, rows] if n == "lse" else t[rows] for n, t in together.items()}
        fault = difference(alone, expected)
        if fault is not None:
            return fault
    return None


PACKED = {
    "same bits again": packed_again,
    "any thread count": packed_any_threads,
    "alone as in a batch": packed_alone,
}


def _packed(implementation: Implementation, dtype: torch.dtype, b: int | None = None) -> PackedCase:
    """Sequences of LENGTHS, or one of them."""
    lengths = torch.tensor(LENGTHS)
    size = max(LENGTHS)
    case = attention_case(Kind(), Shape(len(LENGTHS), 4, 2, size, size, 16, 16), Draw(19, dtype))
    if b is not None:
        part = slice(b, b + 1)
        names = ("q", "k", "v", "grad_out", "grad_lse")
        parts: dict[str, Any] = {name: getattr(case, name)[part] for name in names}
        case, lengths = replace(case, **parts), lengths[part]
    packed = packed_case(case, lengths, lengths)
    packed = packed if implementation.with_lse else packed.without_lse()
    return packed if implementation.backward else packed.forward_only()
