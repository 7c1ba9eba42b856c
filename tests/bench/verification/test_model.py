"""`verify --model`: the bits of a whole model's layers, and the first layer that changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowmax.bench import verify_model
from rowmax.bench.verification.model import AGAIN, ALONE, ON_THREADS


class Layer(nn.Module):
    """x * 2, or something that depends on what it must not depend on."""

    def __init__(self, fault: str | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.fault, self.calls = fault, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        more = 0.0
        if self.fault == AGAIN:
            more = self.calls * 1e-3
        if self.fault == ON_THREADS:
            more = torch.get_num_threads() * 1e-3
        if self.fault == ALONE:
            more = x.shape[0] * 1e-3
        return x * self.scale + x * more


def model(fault: str | None = None) -> nn.Module:
    return nn.Sequential(Layer(), Layer(fault), Layer())


INPUTS = torch.arange(1.0, 13.0).view(4, 3)


def failed(report: Any) -> dict[tuple[str, str], Any]:
    return {(one.check, one.step): one for one in report.checks if not one.passed}


def test_what_depends_on_nothing_else_passes() -> None:
    report = verify_model(model(), INPUTS)
    assert report.passed
    assert [one.compared for one in report.checks] == [4] * 6
    assert "same bits in 4 layers" in str(report)


@pytest.mark.parametrize("fault", [AGAIN, ON_THREADS, ALONE])
def test_the_first_layer_that_differs_is_named(fault: str) -> None:
    report = verify_model(model(fault), INPUTS)
    assert not report.passed
    found = failed(report)
    assert (fault, "forward") in found
    assert found[fault, "forward"].differing == ("1", "2", "")
    assert found[fault, "forward"].share == 1.0
    # the gradient that arrives at a layer's output comes from those behind it: at the first alone
    assert found[fault, "backward"].differing == ("0",)
    if fault == ALONE:
        assert set(found) == {(ALONE, "forward"), (ALONE, "backward")}
    assert "3 of 4 layers differ, the first 1: 1e+02% of the elements" in str(report)
    assert verify_model(model(fault), INPUTS, contract="torch").passed


def test_layouts_of_a_batch_and_errors_of_the_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.turned = Layer(), Layer()

        def forward(self, x: Tensor, lengths: Tensor, name: str) -> dict[str, Any]:
            if x.shape[0] == 1 and name == "picky":
                raise ValueError("a batch of one\nat all")
            flat = self.flat(x.flatten(0, 1)).view(x.shape)
            turned = self.turned(flat.transpose(0, 1)).transpose(0, 1)
            return {"none": None, "logits": turned * lengths.view(-1, 1, 1)}

    inputs = {"x": torch.ones(3, 5, 2), "lengths": torch.tensor([1.0, 2.0, 3.0]), "name": "mine"}
    report = verify_model(Mixed(), inputs)
    assert report.passed
    assert [one.compared for one in report.checks] == [3] * 6
    (one,) = failed(verify_model(Mixed(), inputs | {"name": "picky"})).values()
    assert one.check == ALONE
    assert one.error == "ValueError: a batch of one"


def test_the_model_is_as_before() -> None:
    mine = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    before = torch.get_num_threads()
    assert verify_model(mine, INPUTS).passed  # without dropout
    assert mine.training
    assert torch.get_num_threads() == before
    assert all(parameter.grad is None for parameter in mine.parameters())
    assert not any(module._forward_hooks for module in mine.modules())


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="verify_model: .*model"):
        verify_model(3, INPUTS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verify_model: .*contract"):
        verify_model(model(), INPUTS, contract="mine")


def test_the_command(tmp_path: Path, shown: Any, refused: Any) -> None:
    file, path = tmp_path / "mine.py", tmp_path / "model.json"
    file.write_text(
        "import torch\n"
        "def small():\n    return torch.nn.Linear(2, 2), torch.ones(2, 2)\n"
        "def wrong():\n    return torch.nn.Linear(2, 2)\n"
    )
    assert shown("verify", "--model", f"{file}:small", "--json", str(path)).endswith("\npassed\n")
    assert json.loads(path.read_text())["passed"]
    assert "got a Linear" in refused("verify", "--model", f"{file}:wrong")
    assert "--op: not with --model" in refused("verify", "--model", f"{file}:small", "--op", "x")
    assert "--model: expected MODULE:NAME" in refused("verify", "--model", "nothing")
