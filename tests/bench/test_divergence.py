"""`diverge`: two models of equal structure, layer by layer against float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowmax.bench import diverge
from rowmax.kernels import swap


def encoder(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    return {"src": torch.randn(2, 7, 16, generator=generator), "src_key_padding_mask": padding}


def test_a_swapped_model_and_bfloat16_are_within_what_is_allowed() -> None:
    swapped = encoder()
    swap(swapped)
    for other in (swapped, encoder().bfloat16(), copy.deepcopy(encoder())):
        report = diverge(encoder(), other, inputs())
        assert report.passed, str(report)
        found = [(layer.step, layer.name) for layer in report.layers]
        names = ["layers.0", "layers.1", "layers.2", ""]
        assert found == [("forward", name) for name in names] + [
            ("backward", name) for name in reversed(names)
        ]
    errors = [layer.second for layer in diverge(encoder(), encoder().bfloat16(), inputs()).layers]
    assert max(errors) > 1e-3  # it was bfloat16 that was compared, with float64
    assert all(layer.first < 1e-5 for layer in report.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_layer_beyond_what_is_allowed_is_named(dtype: torch.dtype) -> None:
    other: Any = encoder()
    with torch.no_grad():
        other.layers[1].norm2.weight.mul_(1.3)
    report = diverge(encoder(), other.to(dtype), inputs())
    assert not report.passed
    beyond = report.first_beyond("forward")
    assert beyond is not None
    assert beyond.name == "layers.1"
    assert "forward: the first layer beyond what is allowed is layers.1: error" in str(report)
    page = report.as_html()
    assert "✗ forward: the first layer beyond what is allowed is layers.1" in page
    assert page.count("<figure>") == 2
    deep = diverge(encoder(), other.to(dtype), inputs(), every_layer=True).first_beyond("forward")
    assert deep is not None
    assert deep.name == "layers.1.norm2"


class Near(nn.Module):
    """A ReLU whose input is 0 but for rounding: 3 * 0.1 - 0.3."""

    def __init__(self, beside: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1]))
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        constant = (torch.tensor(3.0) * torch.tensor(0.1)).to(x)
        return torch.relu(x * self.weight - constant + self.beside)


class Two(nn.Module):
    def __init__(self, beside: float) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.scale.weight)
        self.near = Near(beside)

    def forward(self, x: Tensor) -> Tensor:
        return self.near(self.scale(x))


def test_either_side_of_a_relu_is_right() -> None:
    """The gradient of what comes before it is 0 or not: with moved weights both have the same."""
    x = torch.tensor([[3.0]])
    assert diverge(Two(0.0), Two(1e-12), x).passed
    assert not diverge(Two(0.0), Two(0.1), x).passed


def test_what_is_no_model_or_has_nothing_in_common_is_refused() -> None:
    with pytest.raises(TypeError, match="diverge: .*other"):
        diverge(encoder(), 3, inputs())  # type: ignore[arg-type]

    class Silent(nn.Module):
        def forward(self, **_: Any) -> int:
            return 1

    with pytest.raises(ValueError, match="diverge: .*other"):
        diverge(encoder(), Silent(), inputs())


def test_the_command(tmp_path: Path, shown: Any, refused: Any) -> None:
    file = tmp_path / "models.py"
    file.write_text(
        "import copy, torch\n"
        "def one():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))\n"
        "    return model, torch.randn(4, 8)\n"
        "def two():\n"
        "    model, x = one()\n"
        "    other = copy.deepcopy(model)\n"
        "    other[0].eps = 1.0\n"
        "    return model, other, x\n"
        "def none():\n"
        "    return 1, 2\n"
    )
    written, page = tmp_path / "page.json", tmp_path / "page.html"
    files = ["--json", str(written), "--html", str(page)]
    output = shown("diverge", "--models", f"{file}:one", *files)
    assert "none of 3 layers is beyond" in output
    assert json.loads(written.read_text())["names"] == ["original", "swapped"]
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    output = shown("diverge", "--models", f"{file}:two", status=1)
    assert "the first layer beyond what is allowed is 0:" in output
    assert "--models: expected (model, other, inputs)" in refused(
        "diverge", "--models", f"{file}:none"
    )
