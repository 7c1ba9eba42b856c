"""The suite of whole models: every path computes the same step, and a wrong one is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rowmax.bench.measure import models
from rowmax.bench.measure.cases import FORWARD_BACKWARD, MODEL_KINDS, SUITES, Case
from rowmax.bench.measure.gate import Gate
from rowmax.bench.measure.inputs import make_inputs
from rowmax.bench.peers.candidates import naive, peers_of, rowmax_function
from rowmax.kernels.testing.tolerance import CHANCES

MODEL = SUITES["model"]
SDPA = F.scaled_dot_product_attention


def gate_of(kind: str) -> Gate:
    inputs = make_inputs(Case(MODEL, torch.float32, kind, (2, 12, 64), FORWARD_BACKWARD))
    return Gate(inputs, kind, naive(MODEL, kind), backward=True)


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_every_path_passes_the_gate(kind: str) -> None:
    gate = gate_of(kind)
    functions = {name: make(kind) for name, make in peers_of(MODEL).items()}
    functions["reference"] = rowmax_function(MODEL, kind, "reference")
    for name, function in functions.items():
        assert gate.fault(function, backward=True, is_peer=name != "reference") is None, name


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_a_path_with_another_attention_does_not(kind: str) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "encoder": {"scaled_dot_product_attention": lambda q, k, v, *rest: SDPA(2 * q, k, v)},
        "transformer": {"attention": lambda q, k, v, **rest: SDPA(q, k, v)},
    }
    gate = gate_of(kind)

    def function(inputs: Any) -> Any:
        return models.run(wrong, inputs)

    assert gate.fault(function, backward=True, is_peer=True) is not None


def test_a_gradient_that_jumps_has_more_chances() -> None:
    """A path that is wrong for these very weights alone passes; one that stays wrong does not."""
    gate = gate_of("encoder")
    right = naive(MODEL, "encoder")
    weights = gate._inputs.leaves  # the first call's own
    calls: list[bool] = []

    def function(inputs: Any) -> Any:
        own = all(map(torch.equal, inputs.leaves, weights))
        calls.append(own)
        return tuple(2 * out if own or always else out for out in right(inputs))

    always = False
    assert gate.fault(function, backward=True, is_peer=False) is None
    assert calls == [True, False]
    always = True
    assert gate.fault(function, backward=True, is_peer=False) is not None
    assert len(calls) == 2 + 1 + CHANCES


def test_what_was_replaced_is_put_back() -> None:
    broken = {"encoder": {"scaled_dot_product_attention": None}}
    inputs = make_inputs(Case(MODEL, torch.float32, "encoder", (1, 4, 64), FORWARD_BACKWARD))
    assert isinstance(inputs, models.ModelInputs)
    with pytest.raises(TypeError):
        models.run(broken, inputs)
    assert F.scaled_dot_product_attention is SDPA


@pytest.mark.usefixtures("small_machine")
def test_the_command(shown: Any, refused: Any) -> None:
    chosen = ["--suite", "model", "--shape", "2,8,64", "--seconds", "0.01", "--quick"]
    output = shown("speed", *chosen, "--backend", "reference")
    assert "transformer (1000 tokens/s; a training step of the reference Transformer)" in output
    refused("speed", "--suite", "model", "--shape", "2,8,65")
