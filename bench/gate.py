"""The correctness gate: nothing is timed that is not right.

rowmax.kernels passes where its largest error against float64 is at most twice that of the naive
path in the same dtype, plus a few roundings of the largest element; outputs and gradients alike.
It is checked with the very weights dropped that its seed drops.

Torch's paths are checked for computing the same thing, not for how exactly: some of them round
more than the naive path (the weight's gradient in `layer_norm`, at 65536 rows), and to leave out
a fast peer for that would flatter rowmax. They draw dropout from a generator of their own, so they
are checked with dropout off. In half precision the naive path's own error is so large that a small
multiple of it is all that tells a right path from a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import Index, Inputs, Outputs, to_float64
from .peers import Function, run_pass


class Tolerance(NamedTuple):
    """Errors that pass: times the naive path's, plus roundings of the largest element."""

    subject_factor: float
    peer_factor: float
    roundings: float


_WIDE = Tolerance(subject_factor=2.0, peer_factor=64.0, roundings=16.0)
_HALF = Tolerance(subject_factor=2.0, peer_factor=4.0, roundings=1.0)
TOLERANCES = {
    torch.float64: _WIDE,
    torch.float32: _WIDE,
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
}


@dataclass(frozen=True)
class Piece:
    """What is right for a part of the outputs, and how far off the naive path may be."""

    parts: tuple[Index, ...] | None  # of each result; None where it is everything
    exact: Outputs
    plain: Outputs


class Gate:
    """Judges the candidates of one kind and shape; the oracle runs once and serves all of them.

    With `backward`, the oracle's gradients are there to be compared with.
    """

    def __init__(self, inputs: Inputs, naive: Function, *, backward: bool) -> None:
        self._inputs = inputs
        self._naive = naive
        self._backward = backward
        self._pieces: dict[bool, list[Piece]] = {}

    def fault(self, function: Function, *, backward: bool, is_subject: bool) -> str | None:
        """What is wrong with `function`, rowmax's own or a peer's; None when it passes."""
        inputs: Any = self._inputs if is_subject else replace(self._inputs, dropout_p=0.0)
        outputs = run_pass(function, inputs, backward=backward)
        gradients = len(self._inputs.leaves)
        for piece in self._pieces_of(is_subject):
            expected = len(piece.exact) - (gradients if self._backward and not backward else 0)
            if len(outputs) != expected:
                return f"expected {expected} results, got {len(outputs)}"
            for index, got in enumerate(outputs):
                part = got if piece.parts is None else got[piece.parts[index]]
                fault = compare(part, piece.plain[index], piece.exact[index], is_subject=is_subject)
                if fault is not None:
                    return f"result {index} of {len(outputs)}: {fault}"
        return None

    def _pieces_of(self, is_subject: bool) -> list[Piece]:
        with_keep = is_subject and self._inputs.dropout_p > 0.0
        if with_keep not in self._pieces:
            self._pieces[with_keep] = list(self._compute(with_keep))
        return self._pieces[with_keep]

    def _compute(self, with_keep: bool) -> Iterator[Piece]:
        for sub_inputs, part in self._inputs.pieces():
            piece = sub_inputs.with_keep(part) if with_keep else replace(sub_inputs, dropout_p=0.0)
            exact, plain = self._run(to_float64(piece)), self._run(piece)
            yield Piece(None if part is None else part.of_results(), exact, plain)

    def _run(self, inputs: Inputs) -> Outputs:
        """The naive path; without the graph, which holds every score."""
        results = []
        for some in inputs.split():
            outputs = run_pass(self._naive, some, backward=self._backward)
            results.append(tuple(output.detach() for output in outputs))
        return inputs.join(results) if len(results) > 1 else results[0]


def compare(got: Tensor, plain: Tensor, exact: Tensor, *, is_subject: bool) -> str | None:
    """The rule above, for one tensor."""
    if got.shape != exact.shape:
        return f"expected shape {tuple(exact.shape)}, got {tuple(got.shape)}"
    if is_subject and got.dtype != plain.dtype:
        return f"expected {plain.dtype}, got {got.dtype}"
    if exact.numel() == 0:
        return None
    tolerance = TOLERANCES[got.dtype]
    factor = tolerance.subject_factor if is_subject else tolerance.peer_factor
    error = _largest(got.detach().double() - exact)
    rounding = tolerance.roundings * torch.finfo(got.dtype).eps * _largest(exact)
    allowed = factor * _largest(plain.double() - exact) + rounding
    # written so that a NaN fails
    if error <= allowed:
        return None
    return f"largest error {error:.3g} against float64, at most {allowed:.3g} allowed"


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
