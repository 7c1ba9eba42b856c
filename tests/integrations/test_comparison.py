"""`compare`: what it reports is true, and it fails what is wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from rowmax.kernels import compare, swap
from rowmax.kernels.integrations.differences import differences_of
from rowmax.kernels.integrations.torch_modules import norms

WIDTH, LENGTHS = 16, torch.tensor([[8], [3], [5]])
PADDING = torch.arange(8) >= LENGTHS


@pytest.fixture
def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"src": torch.randn(3, 8, WIDTH), "src_key_padding_mask": PADDING}


@pytest.mark.parametrize("pack", [False, True])
def test_a_receipt(encoder: nn.TransformerEncoder, inputs: dict[str, Tensor], pack: bool) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    classes = [type(module) for module in encoder.modules()]
    comparison = compare(encoder, inputs, pack=pack, seconds=0.01)
    assert comparison.passed, str(comparison)
    assert comparison.verdict.startswith("PASS: as close to float64 as the original in every layer")
    rows = [(row.name, row.what) for row in comparison.layers[:-1]]
    assert rows == [
        *(("layers.0", "output"), ("layers.0", "gradient")),
        *(("layers.1", "output"), ("layers.1", "gradient")),
        ("", "output"),
    ]
    assert comparison.layers[-1].what == "gradient of the parameter"
    for row in comparison.layers:
        assert 0 <= row.error_swapped <= row.allowed
        assert row.difference <= row.error_original + row.error_swapped + 1e-12
    for cost in (comparison.original, comparison.swapped):
        assert cost.inference_seconds > 0
        assert cost.training_seconds > 0
        assert cost.saved_bytes > 0
    assert comparison.swapped.saved_bytes < comparison.original.saved_bytes
    assert json.loads(comparison.to_json()) == comparison.to_dict()
    text = str(comparison)
    assert text.splitlines()[-1] == comparison.verdict
    assert "training step, ms" in text
    # the model is as it was
    assert [type(module) for module in encoder.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert encoder.training


@pytest.mark.skipif(sys.platform != "linux", reason="the mark of memory is Linux's")
def test_peaks_hold_what_must_be_there() -> None:
    """Both results of 8 MiB at least, and in training a gradient as large."""
    model = nn.Sequential(nn.Linear(64, 4096), nn.LayerNorm(4096))
    comparison = compare(model, torch.randn(512, 64), seconds=0.01)
    for cost in (comparison.original, comparison.swapped):
        assert cost.inference_peak_bytes is not None
        assert cost.training_peak_bytes is not None
        assert cost.inference_peak_bytes >= 15 << 20
        assert cost.training_peak_bytes >= 22 << 20
        assert cost.training_peak_bytes < 200 << 20
    assert "peak of training, MiB" in str(comparison)


def test_what_is_wrong_fails(
    encoder: nn.TransformerEncoder, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error a thousand times the rounding of float32, in one place, is found and named."""
    fused = getattr(norms, "layer_norm")  # noqa: B009 (mypy: not exported)

    def wrong(x, *args, **kwargs):
        return fused(x, *args, **kwargs) * (1 + 1e-4)

    monkeypatch.setattr(norms, "layer_norm", wrong)
    encoder.norm = nn.LayerNorm(WIDTH)
    comparison = compare(encoder, inputs, seconds=0.01)
    assert not comparison.passed
    assert comparison.verdict.startswith("FAIL: ")
    failed = {(row.name, row.what) for row in comparison.layers if not row.agrees}
    assert ("", "output") in failed
    assert ("layers.0", "output") not in failed


def test_a_model_in_float64_passes(
    encoder: nn.TransformerEncoder, inputs: dict[str, Tensor]
) -> None:
    """Where the truth is the original itself, and its own error is not known."""
    comparison = compare(encoder.double(), {**inputs, "src": inputs["src"].double()}, seconds=0.01)
    assert comparison.passed, str(comparison)


def test_many_errors_as_large_as_one_of_the_original_fail() -> None:
    """The mean of the errors counts, as in every other comparison with float64."""
    exact = torch.randn(400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    original, swapped = exact.float(), (exact + 1e-5).float()
    original[0] += 1e-5
    runs = [{("", "output"): tensor} for tensor in (original, swapped, exact)]
    (row,) = differences_of(*runs)
    assert row.error_swapped < row.allowed
    assert not row.agrees
    (row,) = differences_of(runs[0], runs[0], runs[2])
    assert row.agrees


class Tokens(nn.Module):
    """Makes its encoders' padding masks itself, from the ids: 0 is padding."""

    def __init__(self, encoders: list[nn.TransformerEncoder], shift: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.encoders = nn.ModuleList(encoders)
        self.shift = shift

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for number, encoder in enumerate(self.encoders):
            x = encoder(x, src_key_padding_mask=ids.roll(number * self.shift, 1) == 0)
        return x


IDS = torch.randint(1, 20, (3, 8), generator=torch.Generator().manual_seed(2)) * ~PADDING


def test_padding_that_the_model_finds_itself(encoder: nn.TransformerEncoder) -> None:
    """A packed encoder drops it, and what the original gives there counts for nothing."""
    model = Tokens([encoder])
    comparison = compare(model, IDS, pack=True, seconds=0.01)
    assert comparison.passed, str(comparison)
    told = compare(model, IDS, pack=True, real=~PADDING, seconds=0.01)
    assert comparison.layers == told.layers
    assert any(row.error_swapped > 0 for row in comparison.layers)


def test_encoders_with_different_padding_need_to_be_told(encoder: nn.TransformerEncoder) -> None:
    model = Tokens([encoder, encoder], shift=1)
    with pytest.raises(ValueError, match="`real`: expected a bool tensor .*drop different tokens"):
        compare(model, IDS, pack=True, seconds=0.01)
    compare(model, IDS, pack=True, real=~PADDING, seconds=0.01)


class CastsItsMask(nn.Module):
    """As eager attention of transformers: -1.8e308, float64's least number, becomes -inf."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.rows = rows  # which attend nothing

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = y @ y.transpose(-1, -2)
        scores[:, : self.rows] = torch.finfo(x.dtype).min
        return torch.softmax(scores, -1, dtype=torch.float32).to(x.dtype) @ y


def test_where_float64_gives_nan_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    comparison = compare(CastsItsMask(1), x, seconds=0.01)
    assert comparison.passed, str(comparison)
    unjudged = {(row.name, row.what): row.unjudged for row in comparison.layers if row.unjudged}
    assert unjudged["", "output"] == 0.2  # one row of five
    assert unjudged["norm", "gradient"] == 1.0
    assert f", but where float64 gives NaN, in {len(unjudged)} of" in comparison.verdict
    assert "output, but for 20%: float64 gives NaN" in str(comparison)
    assert json.loads(comparison.to_json()) == comparison.to_dict()

    nothing = compare(CastsItsMask(5), x, seconds=0.01)
    assert not nothing.passed
    assert nothing.verdict.startswith("UNDECIDED: the original's output in float64 is all NaN")

    fused = getattr(norms, "layer_norm")  # noqa: B009 (mypy: not exported)
    monkeypatch.setattr(norms, "layer_norm", lambda *args, **kwargs: fused(*args, **kwargs) + 1e-3)
    assert not compare(CastsItsMask(1), x, seconds=0.01).passed


def test_another_dtype_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = getattr(norms, "layer_norm")  # noqa: B009 (mypy: not exported)
    monkeypatch.setattr(
        norms, "layer_norm", lambda *args, **kwargs: fused(*args, **kwargs).double()
    )
    comparison = compare(nn.Sequential(nn.LayerNorm(WIDTH)), torch.randn(4, WIDTH), seconds=0.01)
    assert not comparison.passed
    assert "(4, 16) torch.float64 in place of (4, 16) torch.float32" in comparison.verdict


def test_nan_does_not_pass(encoder: nn.TransformerEncoder, inputs: dict[str, Tensor]) -> None:
    inputs["src"][0, 0, 0] = torch.nan
    assert not compare(encoder, inputs, seconds=0.01).passed


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_forms_of_inputs(form: str) -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), torch.randn(4, 6)
    inputs = {"tensor": x, "tuple": (x,), "dict": {"input": x}}[form]
    comparison = compare(model, inputs, seconds=0.01)
    assert comparison.passed
    assert [(row.name, row.what) for row in comparison.layers[:2]] == [
        ("1", "output"),
        ("1", "gradient"),
    ]


def test_wrong_input(encoder: nn.TransformerEncoder, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="nothing to swap"):
        compare(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(TypeError, match="`model`"):
        compare(len, inputs)  # type: ignore[arg-type]
    swap(encoder)
    with pytest.raises(ValueError, match="restore it first"):
        compare(encoder, inputs)
