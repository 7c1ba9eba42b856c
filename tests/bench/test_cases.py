"""Shapes, and the work that a case is credited with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rowmax.bench.cases import (
    BACKWARD,
    FORWARD,
    FORWARD_BACKWARD,
    PASSES,
    SUITES,
    Case,
    Suite,
    attention_flops,
    cases_of,
    norm_bytes,
    suits,
)
from rowmax.bench.inputs import AttentionInputs, make_inputs
from rowmax.bench.peers import ATTENTION_PEERS, NORM_PEERS

SHAPE = (3, 2, 10, 4)
CPU = SUITES["cpu-attention"]
# The GPU's kinds and peers, on tensors that are here.
GPU = replace(SUITES["gpu-attention"], device="cpu")


def inputs_of(kind: str, suite: Suite = CPU, shape: tuple[int, ...] = SHAPE) -> AttentionInputs:
    inputs = make_inputs(Case(suite, kind, shape, FORWARD))
    assert isinstance(inputs, AttentionInputs)
    return inputs


def test_every_combination_once() -> None:
    cases = cases_of(CPU, CPU.shapes, CPU.kinds, CPU.steps)
    assert len(cases) == len(set(cases)) == 5 * 4 * 2


def test_the_gpus_cases() -> None:
    """10 shapes of 16384 tokens and a width of 2048; dense and bias up to 4096 keys."""
    suite = SUITES["gpu-attention"]
    assert len(suite.shapes) == 10
    assert {batch * length for batch, _, length, _ in suite.shapes} == {16384}
    assert {heads * size for _, heads, _, size in suite.shapes} == {2048}
    assert set(suite.quick_shapes) < set(suite.shapes)
    cases = cases_of(suite, suite.shapes, suite.kinds, suite.steps)
    assert len(cases) == len(set(cases)) == (6 * 10 + 2 * 6) * 3
    assert {case.shape[2] for case in cases if case.kind == "bias"} == {1024, 2048, 4096}
    norms = SUITES["gpu-norms"]
    assert len(cases_of(norms, norms.shapes, norms.kinds, norms.steps)) == 5 * 4 * 3


def test_kinds_that_a_shape_does_not_suit() -> None:
    assert suits("bias", (1, 1, 4096, 64))
    assert not suits("dense", (1, 1, 4097, 64))
    assert suits("gqa", (1, 16, 8, 8))
    assert not suits("gqa", (1, 12, 8, 8))
    assert suits("layer_norm", (3, 5))


def test_every_peer_of_a_suite_has_a_maker() -> None:
    for suite in SUITES.values():
        assert set(suite.peers) <= set(ATTENTION_PEERS if suite.attention else NORM_PEERS)
        assert set(suite.steps) <= set(PASSES)


def test_flops_of_plain_attention() -> None:
    """Two products of (L x D) by (D x L) and (L x L) by (L x D) a head; five more backward."""
    pairs = inputs_of("plain").pairs
    assert pairs == 3 * 2 * 10 * 10
    forward = 3 * 2 * (2 * 10 * 10 * 4 + 2 * 10 * 10 * 4)
    assert attention_flops(pairs, 4, FORWARD) == forward
    assert attention_flops(pairs, 4, BACKWARD) == forward * 5 // 2
    assert attention_flops(pairs, 4, FORWARD_BACKWARD) == forward * 7 // 2


def test_masked_pairs_are_no_work() -> None:
    assert inputs_of("causal").pairs == 3 * 2 * 55
    padded = inputs_of("padded")
    assert padded.lengths is not None
    assert padded.pairs == 2 * 10 * int(padded.lengths.sum())


def test_the_gpus_kinds() -> None:
    """Small ones; what they mean is what rowmax's mask and the bool tensor both say."""
    shape = (2, 8, 300, 4)
    pairs = 2 * 8 * 300 * 301 // 2
    outside = 300 - 257  # first keys that the last query's window leaves out
    assert inputs_of("window", GPU, shape).pairs == pairs - 16 * outside * (outside + 1) // 2
    assert inputs_of("bias", GPU, shape).pairs == 2 * 8 * 300 * 300
    grouped = inputs_of("gqa", GPU, shape)
    assert (grouped.pairs, grouped.k.shape[1], grouped.group) == (pairs, 1, 8)
    for kind in ("window", "dense", "padded", "gqa"):
        inputs = inputs_of(kind, GPU, shape)
        assert inputs.allowed is not None
        assert inputs.mask is not None
        assert torch.equal(inputs.mask.dense(2, 8, 300, 300), inputs.allowed.expand(2, 8, 300, 300))
        assert inputs.allowed.any(-1).all()
    assert {leaf.dtype for leaf in grouped.leaves} == {torch.bfloat16}
    assert len(inputs_of("bias", GPU, shape).leaves) == 4


@pytest.mark.parametrize("length", [1, 7, 512])
def test_padding_is_uniform_from_half_the_length(length: int) -> None:
    inputs = make_inputs(Case(CPU, "padded", (256, 1, length, 1), FORWARD))
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
    forward, both = arrays
    counts = {FORWARD: forward, FORWARD_BACKWARD: both, BACKWARD: both - forward}
    for step, count in counts.items():
        assert norm_bytes(kind, (100, 10), step) == count * 100 * 10 * 4
        assert norm_bytes(kind, (100, 10), step, itemsize=2) == count * 100 * 10 * 2


def test_inputs_are_the_same_every_time() -> None:
    first, second = inputs_of("padded"), inputs_of("padded")
    assert torch.equal(first.q, second.q)
    assert first.allowed is not None
    assert second.allowed is not None
    assert torch.equal(first.allowed, second.allowed)
