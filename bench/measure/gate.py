"""The correctness gate: only correct candidates are timed.

rowmax.kernels passes where it is as accurate as the naive path: by the oracle, the tolerance and
the test cases of `rowmax.kernels.testing`, outputs and gradients alike, with the very weights
dropped that its seed drops.

Torch's paths are checked for computing the same thing, not for how exactly: some of them round
more than the naive path (the weight's gradient in `layer_norm`, at 65536 rows), and to leave out
a fast peer for that would flatter rowmax. The same rule holds for them with another naive path, the
one that is timed beside them, in the dtype of the inputs throughout, and with a larger factor. They
draw dropout from a generator of their own, so they are checked with dropout off. In half precision
that naive path's own error is so large that a small multiple of it is all that tells a right path
from a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.testing.tolerance import Expected, expected_of_model, measure
from ..peers.candidates import Function, run_pass
from .inputs import AttentionInputs, Inputs, NormInputs, NormRows, Outputs, Part, Rows, to_float64
from .models import ModelInputs

# Times the error of the naive path that is timed.
PEER_FACTORS = {torch.float64: 64.0, torch.float32: 64.0, torch.bfloat16: 4.0, torch.float16: 4.0}


Cut = tuple[Any, Part | Rows | NormRows | None]  # inputs, and the part that they are of the whole


# Times those, where the values are drawn anew each time: of a few elements the naive path's error
# is a matter of luck, and a hundred draws are not to find the one in a hundred.
AGAIN = 2.0


@dataclass(frozen=True)
class Piece:
    """The expected values of a part of the outputs."""

    parts: tuple[Any, ...] | None  # indices of each result; None where it is everything
    expected: tuple[Expected, ...]


class Gate:
    """Judges the candidates of one kind and shape; the oracle runs once and serves all of them.

    `naive` is the path that is timed as "naive". With `backward`, gradients can be judged. The
    oracle runs when the first result is judged, on the values that `inputs` hold then: no candidate
    that has not returned by then can find anything right to return. `pieces` are those of the
    inputs that are judged, by default all that `inputs.pieces()` names.
    """

    def __init__(
        self,
        inputs: Inputs,
        kind: str,
        naive: Function,
        *,
        backward: bool,
        pieces: Sequence[Cut] | None = None,
    ) -> None:
        self._inputs = inputs
        self._kind = kind
        self._naive = naive
        self._backward = backward
        self._cuts = pieces
        self._pieces: dict[tuple[bool, bool], list[Piece]] = {}

    def fault(self, function: Function, *, backward: bool, is_peer: bool) -> str | None:
        """The failure of `function`, a peer or rowmax's own; None when it passes."""
        outputs = self.run(function, backward=backward, is_peer=is_peer)
        return self.judge(outputs, function, backward=backward, is_peer=is_peer)

    def run(self, function: Function, *, backward: bool, is_peer: bool) -> Outputs:
        """The results that are to be judged: of a peer, without dropout."""
        inputs: Any = replace(self._inputs, dropout_p=0.0) if is_peer else self._inputs
        return run_pass(function, inputs, backward=backward)

    def judge(
        self,
        outputs: Outputs,
        function: Function,
        *,
        backward: bool,
        is_peer: bool,
        again: bool = False,
    ) -> str | None:
        """What is wrong with `outputs`, which `function` gave for these inputs.

        `again`: rowmax has passed with other values, and is asked whether it computes the same
        thing still: by the rule of its peers, whose factor is larger then, too. A model that fails
        gets more chances, each with its weights moved by a few roundings.
        """
        found = self._fault(outputs, backward=backward, is_peer=is_peer, again=again)
        if found is None or not isinstance(self._inputs, ModelInputs):
            return found
        for moved in self._inputs.moved():
            gate = Gate(moved, self._kind, self._naive, backward=self._backward)
            outputs = gate.run(function, backward=backward, is_peer=is_peer)
            if gate._fault(outputs, backward=backward, is_peer=is_peer, again=again) is None:
                return None
        return found

    def _fault(self, outputs: Outputs, *, backward: bool, is_peer: bool, again: bool) -> str | None:
        gradients = len(self._inputs.leaves)
        for piece in self._pieces_for(is_peer):
            count = len(piece.expected) - (gradients if self._backward and not backward else 0)
            if len(outputs) != count:
                return f"expected {count} results, got {len(outputs)}"
            for index, actual in enumerate(outputs):
                if type(actual) is not Tensor:
                    return (
                        f"result {index} of {len(outputs)}: a {_kind_of(actual)}, no plain tensor"
                    )
                at = None if piece.parts is None else piece.parts[index]
                if piece.parts is not None and at is None:  # a sum over what is not in the piece
                    continue
                part = actual if at is None else actual[at]
                fault = fault_of(part, piece.expected[index], is_peer=is_peer, again=again)
                if fault is not None:
                    return f"result {index} of {len(outputs)}: {fault}"
        return None

    def _pieces_for(self, is_peer: bool) -> list[Piece]:
        """For a peer, dropout is off, and the naive path is the one that is timed."""
        drops = not is_peer and self._inputs.dropout_p > 0.0
        if (is_peer, drops) not in self._pieces:
            self._pieces[is_peer, drops] = list(
                self._compared_with_naive() if is_peer else self._exact(drops=drops)
            )
        return self._pieces[is_peer, drops]

    def _compared_with_naive(self) -> Iterator[Piece]:
        if (False, False) not in self._pieces:
            self._pieces[False, False] = list(self._exact(drops=False))
        for (inputs, _), exact in zip(self._cut(), self._pieces[False, False], strict=True):
            pairs = zip(exact.expected, self._run(replace(inputs, dropout_p=0.0)), strict=True)
            expected = tuple(one._replace(naive=naive) for one, naive in pairs)
            yield Piece(exact.parts, expected)

    def _exact(self, *, drops: bool) -> Iterator[Piece]:
        for whole_piece, part in self._cut():
            piece: Any = whole_piece if drops else replace(whole_piece, dropout_p=0.0)
            if isinstance(piece, AttentionInputs) and isinstance(part, Part):
                piece = piece.with_keep_mask(part)
            yield Piece(None if part is None else part.result_indices(), self._expected(piece))

    def _cut(self) -> Iterable[Cut]:
        return self._inputs.pieces() if self._cuts is None else self._cuts

    def _expected(self, piece: Inputs) -> tuple[Expected, ...]:
        if isinstance(piece, NormInputs):
            return tuple(piece.test_case(self._kind, backward=self._backward).expected.values())
        if isinstance(piece, ModelInputs):
            pairs = zip(self._run(to_float64(piece)), self._run(piece), strict=True)
            return tuple(expected_of_model(exact, naive) for exact, naive in pairs)
        found = [
            tuple(some.test_case(backward=self._backward).expected.values())
            for some in piece.split()
        ]
        if len(found) == 1:
            return found[0]
        fields = range(len(Expected._fields))
        joined = [piece.join([tuple(one[at] for one in each) for each in found]) for at in fields]
        return tuple(map(Expected, *joined))

    def _run(self, inputs: Inputs) -> Outputs:
        """The naive path that is timed; without the graph, which holds every score."""
        results = []
        for some in inputs.split():
            outputs = run_pass(self._naive, some, backward=self._backward)
            results.append(tuple(output.detach() for output in outputs))
        return inputs.join(results) if len(results) > 1 else results[0]


def fault_of(
    actual: Tensor, expected: Expected, *, is_peer: bool, again: bool = False
) -> str | None:
    """The rule above, for one tensor; a peer may return a wider dtype than rowmax."""
    dtype = expected.naive.dtype
    if is_peer:
        actual = actual.to(dtype)
    factor = PEER_FACTORS[dtype] if is_peer or again else None
    if factor is not None and again:
        factor *= AGAIN
    sum_dtype = torch.promote_types(dtype, torch.float32)
    return measure("", actual.detach(), expected, sum_dtype, factor).fault


def _kind_of(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
