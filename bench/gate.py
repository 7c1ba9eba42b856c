"""The correctness gate: nothing is timed that is not right.

rowmax.kernels passes where its largest error against float64 is at most twice that of the naive
path in the same dtype, plus a few roundings of the largest element; outputs and gradients alike.
It is checked with the very weights dropped that its seed drops.

Torch's paths are checked for computing the same thing, not for how exactly: some of them round
more than the naive path (the weight's gradient in `layer_norm`, at 65536 rows), and to leave out
a fast peer for that would flatter rowmax. They draw dropout from a generator of their own, so they
are checked with dropout off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .inputs import Inputs, Outputs, to_float64
from .peers import Function, oracle, run_pass

ROUNDINGS = 16
SUBJECT_FACTOR = 2.0  # times the naive path's error
PEER_FACTOR = 64.0


@dataclass(frozen=True)
class Piece:
    """What is right for a part of the outputs, and how far off the naive path may be."""

    part: slice | None  # batch elements; None where it is everything
    exact: Outputs
    plain: Outputs


class Gate:
    """Judges the candidates of one case; the oracle runs once and serves all of them."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        self.inputs = inputs
        self._pieces: dict[bool, list[Piece]] = {}

    def fault(self, function: Function, *, is_subject: bool) -> str | None:
        """What is wrong with `function`, rowmax's own or a peer's; None when it passes."""
        inputs: Any = self.inputs if is_subject else replace(self.inputs, dropout_p=0.0)
        factor = SUBJECT_FACTOR if is_subject else PEER_FACTOR
        outputs = run_pass(function, inputs, backward=self.case.backward)
        for piece in self._pieces_of(is_subject):
            if len(outputs) != len(piece.exact):
                return f"expected {len(piece.exact)} results, got {len(outputs)}"
            for index, got in enumerate(outputs):
                part = got if piece.part is None else got[piece.part]
                fault = compare(part, piece.plain[index], piece.exact[index], factor)
                if fault is not None:
                    return f"result {index} of {len(outputs)}: {fault}"
        return None

    def _pieces_of(self, is_subject: bool) -> list[Piece]:
        with_keep = is_subject and self.inputs.dropout_p > 0.0
        if with_keep not in self._pieces:
            self._pieces[with_keep] = list(self._compute(with_keep))
        return self._pieces[with_keep]

    def _compute(self, with_keep: bool) -> Iterator[Piece]:
        naive = oracle(self.case.suite, self.case.kind)
        for sub_inputs, part in self.inputs.pieces():
            piece = sub_inputs.with_keep(part) if with_keep else replace(sub_inputs, dropout_p=0.0)
            exact = run_pass(naive, to_float64(piece), backward=self.case.backward)
            plain = run_pass(naive, piece, backward=self.case.backward)
            yield Piece(part, exact, plain)


def compare(got: Tensor, plain: Tensor, exact: Tensor, factor: float) -> str | None:
    """The rule above, for one tensor."""
    if got.shape != exact.shape:
        return f"expected shape {tuple(exact.shape)}, got {tuple(got.shape)}"
    if exact.numel() == 0:
        return None
    error = _largest(got.detach().double() - exact.detach())
    rounding = ROUNDINGS * torch.finfo(got.dtype).eps * _largest(exact.detach())
    allowed = factor * _largest(plain.detach().double() - exact.detach()) + rounding
    # written so that a NaN fails
    if error <= allowed:
        return None
    return f"largest error {error:.3g} against float64, at most {allowed:.3g} allowed"


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
