"""Shapes, and the work that a case is credited with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rowmax.bench.measure.cases import (
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
    shape_text,
    suits,
)
from rowmax.bench.measure.inputs import AttentionInputs, make_inputs
from rowmax.bench.peers.candidates import ATTENTION_PEERS, NORM_PEERS

SHAPE = (3, 2, 10, 4)
CPU = SUITES["cpu-attention"]
# The GPU's kinds and peers, on tensors that are here.
GPU = replace(SUITES["gpu-attention"], device="cpu")


def inputs_of(kind: str, suite: Suite = CPU, shape: tuple[int, ...] = SHAPE) -> AttentionInputs:
    inputs = make_inputs(Case(suite, suite.dtypes[0], kind, shape, FORWARD))
    assert isinstance(inputs, AttentionInputs)
    return inputs


def test_every_combination_once() -> None:
    """Two dtypes, two passes: five shapes in seven kinds, two long ones, a window, a translation's
    memory; three of decoding, forward only.
    """
    cases = cases_of(CPU, CPU.dtypes, CPU.kinds, CPU.steps)
    assert len(cases) == len(set(cases)) == 2 * (2 * (5 * 7 + 2 + 1 + 1) + 3)
    assert {case.step for case in cases if case.kind == "decode"} == {FORWARD}
    windows = {case.shape for case in cases if case.kind == "window"}
    assert windows < {case.shape for case in cases if case.kind == "full"}


def test_quick_is_less_of_every_kind() -> None:
    quick = cases_of(CPU, CPU.dtypes, CPU.kinds, CPU.steps, quick=True)
    assert {case.kind for case in quick} == set(CPU.kinds)
    assert 0 < len(quick) < len(cases_of(CPU, CPU.dtypes, CPU.kinds, CPU.steps))


def test_shapes_of_ones_own_take_the_suites_place() -> None:
    cases = cases_of(CPU, [torch.float16], ["full", "decode"], [FORWARD], [(2, 2, 1, 9, 4)])
    assert cases == [Case(CPU, torch.float16, "decode", (2, 2, 1, 9, 4), FORWARD)]


def test_the_gpus_cases() -> None:
    """10 shapes of 16384 tokens and a width of 2048; dense and bias up to 4096 keys."""
    suite = SUITES["gpu-attention"]
    assert len(suite.shapes) == 10
    assert {batch * length for batch, _, length, _ in suite.shapes} == {16384}
    assert {heads * size for _, heads, _, size in suite.shapes} == {2048}
    assert set(suite.quick_shapes) < set(suite.shapes)
    cases = cases_of(suite, suite.dtypes, suite.kinds, suite.steps)
    assert len(cases) == len(set(cases)) == (6 * 10 + 2 * 6) * 3
    assert {case.shape[2] for case in cases if case.kind == "bias"} == {1024, 2048, 4096}
    norms = SUITES["gpu-norms"]
    assert len(cases_of(norms, norms.dtypes, norms.kinds, norms.steps)) == 5 * 4 * 3


def test_kinds_that_a_shape_does_not_suit() -> None:
    assert suits("bias", (1, 1, 4096, 64))
    assert not suits("dense", (1, 1, 4097, 64))
    assert suits("gqa", (1, 16, 8, 8))
    assert not suits("gqa", (1, 12, 8, 8))
    assert suits("layer_norm", (3, 5))


@pytest.mark.parametrize(
    "shape, kind",
    [
        ((2, 8, 20, 4), "full"),
        ((2, 8, 1, 4), "full"),
        ((2, 8, 17, 20, 4), "cross"),
        ((2, 8, 20, 4, 4), "cross"),
        ((2, 8, 16, 20, 4), "decode"),
        ((2, 8, 2, 1, 20, 4), "decode"),
        ((2, 8, 2, 20, 20, 4), "full"),
    ],
)
def test_a_shape_is_of_one_of_three_kinds(shape: tuple[int, ...], kind: str) -> None:
    assert [name for name in ("full", "cross", "decode") if suits(name, shape)] == [kind]
    assert suits("padded+dropout", shape)
    assert suits("causal", shape) == (kind == "full")


def test_a_shape_in_words() -> None:
    assert shape_text((2, 8, 20, 4)) == "(2,8,20,4)"
    assert shape_text((16, 32, 8, 1, 1024, 128)) == "(16,32/8,1,1024,128)"


def test_every_peer_of_a_suite_has_a_maker() -> None:
    for suite in SUITES.values():
        assert set(suite.peers) <= set(ATTENTION_PEERS if suite.attention else NORM_PEERS)
        assert set(suite.steps) <= set(PASSES)


def test_flops_of_plain_attention() -> None:
    """Two products of (L x D) by (D x L) and (L x L) by (L x D) a head; five more backward."""
    pairs = inputs_of("full").pairs
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


def test_parts_are_joined() -> None:
    """Masks are met by all of them at once; the pairs that are left are counted."""
    inputs = inputs_of("causal+padded+bias+dropout", shape=(3, 2, 40, 4))
    assert inputs.lengths is not None
    assert inputs.allowed is not None
    assert inputs.mask is not None
    assert inputs.bias is not None
    assert inputs.dropout_p > 0
    assert not inputs.causal  # it is not all of the mask
    written = inputs.mask.dense(3, 2, 40, 40)
    assert torch.equal(written, inputs.allowed.expand(3, 2, 40, 40))
    assert inputs.pairs == int(written.sum()) < 3 * 2 * 40 * 41 // 2


def test_queries_and_keys_of_their_own_lengths() -> None:
    inputs = inputs_of("padded+bias", shape=(3, 8, 2, 5, 30, 4))
    assert inputs.q.shape == inputs.d_out.shape == (3, 8, 5, 4)
    assert inputs.k.shape == inputs.v.shape == (3, 2, 30, 4)
    assert inputs.bias is not None
    assert inputs.bias.shape == (1, 8, 5, 30)
    assert inputs.lengths is not None
    assert inputs.pairs == 8 * 5 * int(inputs.lengths.sum())
    assert inputs.bytes_to_move == 4 * 4 * (2 * 3 * 8 * 5 + 2 * 3 * 2 * 30)
    assert inputs.to_copy().nbytes == inputs.k.nbytes + inputs.v.nbytes


@pytest.mark.parametrize("length", [1, 7, 512])
def test_padding_is_uniform_from_half_the_length(length: int) -> None:
    inputs = make_inputs(Case(CPU, torch.float32, "padded", (256, 1, length, 1), FORWARD))
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
