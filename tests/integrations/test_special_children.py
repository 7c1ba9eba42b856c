"""Layers whose children do more than their stock class: what makes them special is never lost.

Each case is compared with torch's own layer, changed in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from rowmax.kernels import swap
from rowmax.kernels.integrations.torch_modules import transformer_layers

WIDTH, HEADS, BATCH, LENGTH = 16, 4, 3, 5
PADDING = torch.arange(LENGTH) >= torch.tensor([[5], [4], [2]])
LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "encoder": (
        nn.TransformerEncoderLayer,
        (
            *("self_attn", "self_attn.out_proj", "linear1", "activation", "dropout", "linear2"),
            *("dropout1", "dropout2", "norm1", "norm2"),
        ),
    ),
    "decoder": (
        nn.TransformerDecoderLayer,
        (
            *("self_attn", "multihead_attn", "multihead_attn.out_proj", "linear1", "activation"),
            *("dropout", "linear2", "dropout1", "dropout2", "dropout3", "norm1", "norm2", "norm3"),
        ),
    ),
}


def build(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "activation": nn.GELU(), "batch_first": True} | options
    layer = LAYERS[kind][0](WIDTH, HEADS, 32, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return layer


def call(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, memory = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=generator)
    if isinstance(layer, nn.TransformerDecoderLayer):
        return layer(x, memory, memory_key_padding_mask=PADDING)
    return layer(x, src_key_padding_mask=PADDING)


def scaled(result: Any) -> Any:
    return (3 * result[0], *result[1:]) if isinstance(result, tuple) else 3 * result


def watched(function: Callable[..., Any], look: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """The same function; `look` is shown its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        look(args, kwargs)
        return function(*args, **kwargs)

    return call


class Around(nn.Module):
    """In a child's place, as LoRA and quantisation put theirs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return scaled(self.inner(*args, **kwargs))


def on_the_instance(layer: nn.Module, name: str, *, method: str) -> None:
    child = layer.get_submodule(name)
    own = getattr(child, method)
    setattr(child, method, lambda *args, **kwargs: scaled(own(*args, **kwargs)))


def of_a_subclass(layer: nn.Module, name: str, *, method: str) -> None:
    child = layer.get_submodule(name)
    own = getattr(type(child), method)
    changed = {method: lambda *args, **kwargs: scaled(own(*args, **kwargs))}
    child.__class__ = type("Own", (type(child),), changed)


def hook(layer: nn.Module, name: str) -> None:
    layer.get_submodule(name).register_forward_hook(lambda _, __, out: scaled(out))


def hook_before(layer: nn.Module, name: str) -> None:
    layer.get_submodule(name).register_forward_pre_hook(lambda _, args: scaled(args))


def another_module(layer: nn.Module, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(path), attribute, Around(layer.get_submodule(name)))


CHANGES: dict[str, Callable[[nn.Module, str], None]] = {
    "forward_on_the_instance": functools.partial(on_the_instance, method="forward"),
    # what torch's `__call__` hands over to
    "call_on_the_instance": functools.partial(on_the_instance, method="_call_impl"),
    "forward_of_a_subclass": functools.partial(of_a_subclass, method="forward"),
    "call_of_a_subclass": functools.partial(of_a_subclass, method="__call__"),
    "hook": hook,
    "hook_before": hook_before,
    "another_module": another_module,
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_changed_child_does_what_it_does_in_torch(
    kind: str, change: str, norm_first: bool
) -> None:
    """Changed before the swap, and after it."""
    for name in LAYERS[kind][1]:
        layer = build(kind, norm_first=norm_first)
        plain = call(layer)
        CHANGES[change](layer, name)
        expected = call(layer)
        # torch's attention multiplies by the weights of its projection and never calls it
        kept = name.endswith("out_proj") or (change == "hook_before" and "attn" in name)
        if not kept and not (change == "hook_before" and name.startswith("norm")):
            assert (expected - plain).abs().max() > 0.1, name
        swap(layer)
        torch.testing.assert_close(call(layer), expected, rtol=1e-11, atol=1e-11, msg=name)
        layer = build(kind, norm_first=norm_first)
        swap(layer)
        CHANGES[change](layer, name)
        torch.testing.assert_close(call(layer), expected, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "kind,block",
    [
        *(("encoder", "_sa_block"), ("encoder", "_ff_block")),
        *(("decoder", "_sa_block"), ("decoder", "_ff_block"), ("decoder", "_mha_block")),
    ],
)
def test_a_block_set_on_the_instance(kind: str, block: str, after: bool) -> None:
    def change(layer: Any) -> None:
        own = getattr(layer, block)
        setattr(layer, block, lambda *args, **kwargs: scaled(own(*args, **kwargs)))

    layer = build(kind)
    change(layer)
    expected = call(layer)
    layer = build(kind)
    if after:
        swap(layer)
        change(layer)
    else:
        change(layer)
        swap(layer)
    torch.testing.assert_close(call(layer), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_parametrized_children_are_fused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parametrization makes the weight, not the call."""
    layer = build(kind)
    for name in ("norm1", "norm2", "linear1", "self_attn.out_proj"):
        parametrizations.weight_norm(layer.get_submodule(name), "weight")
    parametrizations.weight_norm(layer.get_submodule("self_attn"), "in_proj_weight")
    expected = call(layer)
    calls: list[Any] = []
    fused = getattr(transformer_layers, "add_layer_norm")  # noqa: B009 (mypy: not exported)
    monkeypatch.setattr(
        transformer_layers, "add_layer_norm", watched(fused, lambda *seen: calls.append(seen))
    )
    swap(layer)
    torch.testing.assert_close(call(layer), expected, rtol=1e-11, atol=1e-11)
    assert len(calls) == (2 if kind == "encoder" else 3)


@pytest.mark.parametrize(
    "activation",
    [functools.partial(F.gelu, approximate="tanh"), functools.partial(F.leaky_relu), nn.SiLU()],
    ids=["partial", "partial of nothing", "module"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_any_activation(kind: str, activation: Any) -> None:
    layer = build(kind, activation=activation)
    expected = call(layer)
    swap(layer)
    torch.testing.assert_close(call(layer), expected, rtol=1e-11, atol=1e-11)


class Sampled(nn.Dropout):
    """Drops nothing in its own way, whatever p is."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input * 0.5


@pytest.mark.parametrize(
    "other", [Sampled(0.9), nn.Identity(), nn.Dropout(0.0, inplace=True), nn.AlphaDropout(0.0)]
)
def test_another_dropout(other: nn.Module) -> None:
    layer: Any = build("encoder")
    layer.dropout1 = other
    expected = call(layer)
    swap(layer)
    torch.testing.assert_close(call(layer), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("hooked", [False, True])
def test_an_attention_of_ones_own_is_handed_what_torch_hands_it(hooked: bool) -> None:
    """Float masks, whatever came; a hook on torch's attention sees them too."""
    layer: Any = build("encoder")
    seen: list[dict[str, Any]] = []
    if hooked:
        layer.self_attn.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True
        )
    else:
        layer.self_attn.forward = watched(
            layer.self_attn.forward, lambda _, kwargs: seen.append(kwargs)
        )
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    expected = layer(x, src_mask=mask, src_key_padding_mask=PADDING)
    swap(layer)
    out = layer(x, src_mask=mask, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    before, now = seen
    assert before.keys() == now.keys()
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, msg=name)


class Recording(nn.TransformerEncoderLayer):
    """A layer of a user's own."""

    seen: dict[str, Any]

    def forward(self, src: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.seen = kwargs
        return src + self.linear2(self.linear1(self.norm1(src)))


@pytest.mark.parametrize("pack", [False, True])
def test_a_layer_of_ones_own_is_handed_what_torch_hands_it(pack: bool) -> None:
    layer = Recording(WIDTH, HEADS, 32, dtype=torch.float64, batch_first=True)
    model: Any = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    expected = model(x, mask=mask, src_key_padding_mask=PADDING)
    before = model.layers[0].seen
    swap(model, pack=pack)
    out = model(x, mask=mask, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert before.keys() == model.layers[0].seen.keys()
    for name, value in before.items():
        torch.testing.assert_close(model.layers[0].seen[name], value, msg=name)


@pytest.mark.parametrize("name", ["layers.1", "layers.1.self_attn"])
def test_a_forward_set_since_is_never_handed_packed_tokens(name: str) -> None:
    """It was written for (B, L, E) and a mask."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        *(WIDTH, HEADS, 32), dropout=0.0, batch_first=True, dtype=torch.float64
    )
    model: Any = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    expected = model(x, src_key_padding_mask=PADDING)
    swap(model, pack=True)
    child: Any = model.get_submodule(name)
    shapes: list[Any] = []
    child.forward = watched(child.forward, lambda args, _: shapes.append(args[0].shape))
    out = model(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out[~PADDING], expected[~PADDING], rtol=1e-11, atol=1e-11)
    assert shapes == [(BATCH, LENGTH, WIDTH)]
