"""ONNX Runtime and OpenVINO: asked for the same as everyone, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rowmax.bench.measure.arena import CaseArena
from rowmax.bench.measure.cases import FORWARD, SUITES, Case
from rowmax.bench.measure.gate import Gate
from rowmax.bench.measure.inputs import AttentionInputs, make_inputs
from rowmax.bench.peers import candidates as peers
from rowmax.bench.peers.candidates import naive_attention, run_pass
from rowmax.bench.peers.engines import Engine, Run, onnx_runtime, open_vino
from rowmax.bench.peers.packages import UnsupportedError

SUITE = SUITES["cpu-attention"]
SQUARE = (3, 8, 40, 16)
CASES = [
    *((kind, SQUARE) for kind in ("full", "causal", "padded", "bias", "causal+padded+bias")),
    ("causal+padded", SQUARE),
    ("window", (2, 2, 300, 16)),
    ("cross", (3, 8, 20, 40, 16)),
    ("padded", (3, 8, 20, 40, 16)),
    ("decode", (3, 8, 1, 40, 16)),
    ("decode", (3, 8, 2, 1, 40, 16)),
]


def inputs_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> AttentionInputs:
    inputs = make_inputs(Case(SUITE, dtype, kind, shape, FORWARD))
    assert isinstance(inputs, AttentionInputs)
    return inputs


def engine_of(name: str, make: Callable[[], Engine]) -> Engine:
    if peers.absent(name):
        pytest.skip(f"{name} is not installed (the extra 'peers')")
    return make()


@pytest.mark.parametrize("name, make", [("onnxruntime", onnx_runtime), ("openvino", open_vino)])
@pytest.mark.parametrize("kind, shape", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_computes_the_same(
    name: str, make: Callable[[], Engine], kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = inputs_of(kind, shape, dtype)
    engine = engine_of(name, make)
    if name == "onnxruntime" and dtype != torch.float32:
        with pytest.raises(UnsupportedError, match="no bfloat16 attention"):
            run_pass(engine, inputs, backward=False)
        return
    gate = Gate(inputs, "full", naive_attention, backward=False)
    assert gate.fault(engine, backward=False, is_peer=True) is None


def test_openvino_has_no_grouped_heads_for_several_queries() -> None:
    pytest.importorskip("openvino")
    with pytest.raises(UnsupportedError, match="no grouped heads"):
        run_pass(open_vino(), inputs_of("full", (1, 8, 2, 5, 5, 8), torch.float32), backward=False)


class Prepared:
    """Stands for an engine: counts what it prepares and binds, and gives back bound queries."""

    def __init__(self) -> None:
        self.prepared = self.bound = 0

    def __call__(self, inputs: AttentionInputs) -> Run:
        self.prepared += 1
        queries = [inputs.q.detach().clone()]

        def bind(inputs: AttentionInputs) -> None:
            self.bound += 1
            queries[0] = inputs.q.detach().clone()

        return Run(lambda: queries[0], bind)


def test_an_engine_is_prepared_once_for_the_same_shapes_and_bound_to_other_values() -> None:
    prepared = Prepared()
    engine = Engine("E", prepared)
    inputs = inputs_of("padded", SQUARE, torch.float32)
    for same in (inputs, replace(inputs, dropout_p=0.0)):  # the gate's, then what is timed
        assert torch.equal(run_pass(engine, same, backward=False)[0], inputs.q)
    assert (prepared.prepared, prepared.bound) == (1, 0)
    moved = replace(inputs, q=inputs.q + 1)
    assert torch.equal(run_pass(engine, moved, backward=False)[0], moved.q)
    with torch.no_grad():
        moved.q.mul_(2.0)
    assert torch.equal(run_pass(engine, moved, backward=False)[0], moved.q)
    assert (prepared.prepared, prepared.bound) == (1, 2)
    engine.rebind(inputs)
    assert torch.equal(run_pass(engine, inputs, backward=False)[0], inputs.q)
    assert (prepared.prepared, prepared.bound) == (1, 3)
    run_pass(engine, replace(inputs, allowed=None), backward=False)
    assert prepared.prepared == 2


@pytest.mark.parametrize("name, make", [("onnxruntime", onnx_runtime), ("openvino", open_vino)])
@pytest.mark.parametrize("kind", ["full", "causal", "bias", "padded+bias"])
def test_a_bound_engine_sees_other_values_and_other_addresses(
    name: str, make: Callable[[], Engine], kind: str
) -> None:
    """Those that read the tensors themselves, and those that copy them into a layout of theirs."""
    engine = engine_of(name, make)
    arena = CaseArena(inputs_of(kind, SQUARE, torch.float32), seed=1)
    for change in (arena.arena.renew, arena.moved, arena.arena.renew):
        run_pass(engine, arena.inputs, backward=False)
        change()
        gate = Gate(arena.inputs, kind, naive_attention, backward=False)
        assert gate.fault(engine, backward=False, is_peer=True) is None


def test_what_engines_have_not() -> None:
    engine = Engine("E", Prepared())
    with pytest.raises(UnsupportedError, match="E has no backward"):
        run_pass(engine, inputs_of("full", SQUARE, torch.float32), backward=True)
    with pytest.raises(UnsupportedError, match="no dropout"):
        run_pass(engine, inputs_of("dropout", SQUARE, torch.float32), backward=False)
