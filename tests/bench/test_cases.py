"""Shapes, and the work that a case is credited with."""

from __future__ import annotations

import pytest
import torch

from rowmax.bench.cases import (
    FORWARD,
    FORWARD_BACKWARD,
    PASSES,
    SUITES,
    Case,
    attention_flops,
    cases_of,
    norm_bytes,
)
from rowmax.bench.inputs import AttentionInputs, make_inputs

SHAPE = (3, 2, 10, 4)


def inputs_of(kind: str) -> AttentionInputs:
    inputs = make_inputs(Case("cpu-attention", kind, SHAPE, FORWARD))
    assert isinstance(inputs, AttentionInputs)
    return inputs


def test_every_combination_once() -> None:
    suite = SUITES["cpu-attention"]
    cases = cases_of(suite, suite.shapes, suite.kinds, PASSES)
    assert len(cases) == len(set(cases)) == 5 * 4 * 2


def test_flops_of_plain_attention() -> None:
    """Two products of (L x D) by (D x L) and (L x L) by (L x D) a head; five more backward."""
    pairs = inputs_of("plain").pairs
    assert pairs == 3 * 2 * 10 * 10
    forward = 3 * 2 * (2 * 10 * 10 * 4 + 2 * 10 * 10 * 4)
    assert attention_flops(pairs, 4, backward=False) == forward
    assert attention_flops(pairs, 4, backward=True) == forward * 7 // 2


def test_masked_pairs_are_no_work() -> None:
    assert inputs_of("causal").pairs == 3 * 2 * 55
    padded = inputs_of("padded")
    assert padded.lengths is not None
    assert padded.pairs == 2 * 10 * int(padded.lengths.sum())


@pytest.mark.parametrize("length", [1, 7, 512])
def test_padding_is_uniform_from_half_the_length(length: int) -> None:
    inputs = make_inputs(Case("cpu-attention", "padded", (256, 1, length, 1), FORWARD))
    assert isinstance(inputs, AttentionInputs)
    assert inputs.lengths is not None
    assert inputs.allowed is not None
    assert inputs.lengths.min() >= length / 2
    assert inputs.lengths.max() <= length
    assert torch.equal(inputs.allowed.sum(-1).flatten(), inputs.lengths)
    if length > 100:
        assert len(inputs.lengths.unique()) > 100


@pytest.mark.parametrize(
    "kind, arrays", [("layer_norm", (2, 5)), ("add_layer_norm", (4, 8)), ("masked_softmax", (2, 5))]
)
def test_bytes_of_a_norm(kind: str, arrays: tuple[int, int]) -> None:
    for step, count in zip(PASSES, arrays, strict=True):
        got = norm_bytes(kind, (100, 10), backward=step == FORWARD_BACKWARD)
        assert got == count * 100 * 10 * 4


def test_inputs_are_the_same_every_time() -> None:
    first, second = inputs_of("padded"), inputs_of("padded")
    assert torch.equal(first.q, second.q)
    assert first.allowed is not None
    assert second.allowed is not None
    assert torch.equal(first.allowed, second.allowed)
