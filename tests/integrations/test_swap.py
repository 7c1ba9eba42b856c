"""What a swap changes and what not, the report, and the errors."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowmax.kernels import attention, swap, swapped
from rowmax.kernels.backends import dispatch
from rowmax.kernels.integrations.torch_modules.instances import Swapped
from rowmax.kernels.ops.problem import Problem

WIDTH = 16


class OwnNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class Model(nn.Module):
    """One of each: layers, attention, norms, and what can't be swapped."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.rms = nn.RMSNorm(WIDTH)
        self.own = OwnNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rms(self.norm(self.encoder(x)))
        return self.head(self.own(x + self.attention(x, x, x, need_weights=False)[0]))


SITES = {
    "encoder": "encoder",
    "encoder.layers.0": "layer",
    "encoder.layers.0.self_attn": "attention",
    "encoder.layers.0.norm1": "norm",
    "encoder.layers.0.norm2": "norm",
    "attention": "attention",
    "norm": "norm",
    "rms": "norm",
    "own": "norm",
}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, WIDTH)


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_every_site_is_reported_with_a_reason(model: Model) -> None:
    report = swap(model)
    assert {site.name: site.kind for site in report.sites} == SITES
    assert [site.name for site in report.left] == ["own"]
    assert report.left[0].reason == "OwnNorm has a forward of its own"
    assert all(site.reason for site in report.sites)
    text = str(report)
    assert text.splitlines()[0] == "Model: 8 of 9 sites swapped, backend auto"
    for site in report.sites:
        assert any(site.name in line and site.reason in line for line in text.splitlines())
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.to_dict()["sites"][0]["name"] == "encoder"
    for name, module in model.named_modules():
        assert isinstance(module, Swapped) == (name in SITES and name != "own")


def test_only_the_class_of_instances_changes(model: Model, x: Tensor) -> None:
    other, before, classes = Model(), model.state_dict(), classes_of(model)
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    globals_before = (nn.LayerNorm.forward, nn.functional.scaled_dot_product_attention)
    shown = repr(model)
    with swapped(model):
        assert repr(model) == shown
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for name, module in model.named_modules():
            assert module.__dict__.keys() == state[name].keys()
            assert all(value is state[name][key] for key, value in module.__dict__.items())
        assert isinstance(model.norm, nn.LayerNorm)
        assert classes_of(other) == classes
        assert globals_before == (
            nn.LayerNorm.forward,
            nn.functional.scaled_dot_product_attention,
        )
    assert classes_of(model) == classes


def test_restored_exactly_and_once(model: Model, x: Tensor) -> None:
    expected, classes = model(x), classes_of(model)
    report = swap(model)
    torch.testing.assert_close(model(x), expected)
    report.restore()
    report.restore()
    assert classes_of(model) == classes
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="on purpose"), swapped(model):
        raise RuntimeError("on purpose")
    assert classes_of(model) == classes


def test_swapping_twice_is_harmless(model: Model, x: Tensor) -> None:
    classes = classes_of(model)
    first = swap(model)
    inside = classes_of(model)
    second = swap(model)
    assert classes_of(model) == inside
    assert not second.swapped
    assert {site.reason for site in second.left} >= {"swapped before (auto)"}
    second.restore()
    assert classes_of(model) == inside
    first.restore()
    assert classes_of(model) == classes


def test_two_swaps_of_different_sites(model: Model) -> None:
    classes = classes_of(model)
    first = swap(model, norms=False)
    second = swap(model, attention=False)
    assert isinstance(model.norm, Swapped)
    first.restore()
    assert isinstance(model.norm, Swapped)
    assert not isinstance(model.attention, Swapped)
    second.restore()
    assert classes_of(model) == classes


def test_a_deep_copy_is_swapped_and_on_its_own(model: Model, x: Tensor) -> None:
    report = swap(model)
    duplicate = copy.deepcopy(model)
    assert classes_of(duplicate) == classes_of(model)
    assert torch.equal(duplicate(x), model(x))
    with torch.no_grad():
        duplicate.norm.weight.zero_()
    assert model.norm.weight.all()
    report.restore()
    assert isinstance(duplicate.norm, Swapped)
    assert type(copy.copy(duplicate.norm)) is type(duplicate.norm)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_that_of_the_original(model: Model, x: Tensor, protocol: int) -> None:
    classes, expected = classes_of(model), model(x)
    swap(model)
    data = pickle.dumps(model, protocol)
    assert b"rowmax" not in data
    assert classes_of(pickle.loads(data)) == classes
    file = io.BytesIO()
    torch.save(model, file, pickle_protocol=protocol)
    assert b"rowmax" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert classes_of(loaded) == classes
    assert torch.equal(loaded(x), expected)


def test_hooks_and_mode_and_dtype(model: Model, x: Tensor) -> None:
    seen = []
    model.attention.register_forward_hook(lambda *_: seen.append("forward"))
    model.norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.eval()
    swap(model)
    assert not model.attention.training
    model(x).sum().backward()
    assert seen == ["forward", "backward"]
    model.double()
    assert model(x.double()).dtype == torch.float64
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert not model.norm.weight.any()


def test_the_filter_sees_every_site_by_name(model: Model) -> None:
    asked: list[tuple[str, str]] = []

    def norms_at_the_top(module: nn.Module, name: str) -> bool:
        asked.append((name, type(module).__name__))
        return name in ("norm", "rms")

    report = swap(model, filter_fn=norms_at_the_top)
    assert [site.name for site in report.swapped] == ["norm", "rms"]
    assert {name for name, _ in asked} == set(SITES) - {"own"}
    assert {site.reason for site in report.left if site.name != "own"} == {"filter_fn left it out"}


def test_a_named_backend_is_the_one_that_runs(
    model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    choose = dispatch.choose

    def noted(name: str, problem: Any) -> Any:
        chosen.append((name, problem.op_name))
        return choose(name, problem)

    monkeypatch.setattr(dispatch, "choose", noted)
    swap(model, backend="reference")
    model(x)
    assert {name for name, _ in chosen} == {"reference"}
    assert {"attention", "layer_norm", "add_layer_norm", "rms_norm"} == {op for _, op in chosen}


def test_nothing_to_swap() -> None:
    with pytest.raises(ValueError, match="nothing to swap.*has no nn.MultiheadAttention"):
        swap(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="OwnNorm has a forward of its own"):
        swap(nn.Sequential(OwnNorm(3)))
    with pytest.raises(ValueError, match="nothing to swap"):
        swap(nn.LayerNorm(3), norms=False)


def test_nothing_to_pack(model: Model) -> None:
    classes = classes_of(model.attention)
    with pytest.raises(ValueError, match="`pack`: expected a model with an nn.TransformerEncoder"):
        swap(model.attention, pack=True)
    assert classes_of(model.attention) == classes
    with swapped(model, pack=True, filter_fn=lambda _, name: "self_attn" not in name) as report:
        (encoder,) = (site for site in report.swapped if site.kind == "encoder")
    assert encoder.reason.endswith("not packed, because encoder.layers.0.self_attn is left")


def test_a_filter_that_matches_nothing(model: Model) -> None:
    classes = classes_of(model)
    with pytest.raises(ValueError, match="none of 9 sites"):
        swap(model, filter_fn=lambda *_: False)
    with pytest.raises(ValueError, match="filter_fn left out all 1 sites"):
        swap(nn.LayerNorm(3), filter_fn=lambda *_: False)
    assert classes_of(model) == classes


def test_a_backend_that_lacks_the_dtype_is_refused_beforehand(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dispatch.refusal

    def refuses(name: str, problem: Problem) -> str | None:
        half = name == "native" and problem[0].dtype == torch.float16
        return "torch.float16 is not done" if half else before(name, problem)

    monkeypatch.setattr(dispatch, "refusal", refuses)
    model.half()
    classes = classes_of(model)
    with pytest.raises(RuntimeError, match="backend 'native' can't do .*float16"):
        swap(model, attention=False, backend="native")
    with pytest.raises(RuntimeError, match="backend 'native' can't do .*Nothing was changed"):
        swap(model, norms=False, backend="native")
    assert classes_of(model) == classes
    swap(model)  # other backends do float16
    assert model(torch.randn(2, 5, WIDTH, dtype=torch.float16)).dtype == torch.float16


def test_wrong_arguments(model: Model) -> None:
    with pytest.raises(TypeError, match="`model`: expected a torch.nn.Module, got function"):
        swap(attention)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`filter_fn`"):
        swap(model, filter_fn="norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`backend`: expected one of auto"):
        swap(model, backend="cuda")


def test_a_forward_set_on_the_instance_is_left(model: Model) -> None:
    replaced: Any = model.norm
    replaced.forward = lambda x: x
    report = swap(model)
    reasons = {site.name: site.reason for site in report.left}
    assert reasons["norm"] == "its forward was replaced on the instance"
    assert replaced.forward(1) == 1


def test_data_parallel_replicas_run_their_own_parameters(model: Model) -> None:
    swap(model)
    replica = model.norm._replicate_for_data_parallel()
    assert type(replica) is type(model.norm)
