"""Linear maps by oneDNN: the same numbers, and only where torch's own are not needed."""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowmax.kernels.ops.torch_internals import onednn_linear
from rowmax.transformer import linear as module
from rowmax.transformer.linear import Linear, constant_weights, linear

X, BIAS = torch.randn(32, 2, 512), torch.randn(1024)
WEIGHT = nn.Parameter(torch.randn(1024, 512), requires_grad=False)


@pytest.fixture
def layouts() -> list[Tensor]:
    """The weights that were copied into oneDNN's own layout."""
    return []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, layouts: list[Tensor]) -> list[Tensor]:
    """What oneDNN gave, in a torch that has it."""
    onednn = onednn_linear()
    if onednn is None:
        pytest.skip("this torch has no oneDNN")
    multiply, reorder = onednn
    found: list[Tensor] = []

    def spy(*arguments: Any) -> Tensor:
        found.append(multiply(*arguments))
        return found[-1]

    def reordered(weight: Tensor, rows: int) -> Tensor:
        layouts.append(weight)
        return reorder(weight, rows)

    monkeypatch.setattr(module, "_onednn", lambda: (spy, reordered))
    return found


@pytest.mark.parametrize("bias", [None, BIAS], ids=["without", "with bias"])
@pytest.mark.parametrize("x", [X, X[:, 0], X.transpose(0, 1)], ids=["3-d", "apart", "transposed"])
def test_the_same_numbers(x: Tensor, bias: Tensor | None, calls: list[Tensor]) -> None:
    with torch.inference_mode():
        got = linear(x.repeat(2, *[1] * (x.dim() - 1)), WEIGHT, bias)
    assert calls
    wide = None if bias is None else bias.double()
    expected = nn.functional.linear(x.double(), WEIGHT.double(), wide).float()
    # Sums of 512 products of about 1, in float32.
    torch.testing.assert_close(got[: len(x)], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rows", [1, 30, 64, 100])
def test_a_weight_in_another_layout(rows: int, calls: list[Tensor], layouts: list[Tensor]) -> None:
    """Products of fewer rows than it was made for, and of more."""
    x = X.flatten(0, 1).repeat(2, 1)
    with torch.inference_mode(), constant_weights():
        for _ in range(2):
            linear(x[:64], WEIGHT)
        calls.clear()
        got = linear(x[:rows], WEIGHT, BIAS)
        assert linear(x[:rows, None], WEIGHT).shape == (rows, 1, 1024)
    assert len(calls) == 2
    assert len(layouts) == 1
    expected = nn.functional.linear(x[:rows].double(), WEIGHT.double(), BIAS.double()).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_a_layout_is_that_of_one_weight_within_the_outermost(
    calls: list[Tensor], layouts: list[Tensor]
) -> None:
    x, other = X[:, 0], nn.Parameter(torch.randn(1024, 512))
    with torch.inference_mode():
        with constant_weights():
            linear(x, WEIGHT)
            with constant_weights():
                linear(x, WEIGHT)
            got = linear(x, other), linear(x, other), linear(x, WEIGHT)
            assert [id(weight) for weight in layouts] == [id(WEIGHT), id(other)]
        changed = nn.Parameter(WEIGHT + 1)
        with constant_weights():
            after = [linear(x, changed) for _ in range(3)]
    for found, weight in zip((*got, *after), (other, other, WEIGHT, *[changed] * 3), strict=True):
        expected = nn.functional.linear(x.double(), weight.double()).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-4)
    assert linear(x, WEIGHT) is not calls[-1]


def test_layouts_of_one_thread_are_not_anothers(calls: list[Tensor], layouts: list[Tensor]) -> None:
    def products() -> None:
        with torch.inference_mode():
            for _ in range(3):
                linear(X[:, 0], WEIGHT)

    with constant_weights():
        thread = threading.Thread(target=products)
        thread.start()
        thread.join()
        assert not layouts
        products()
    assert len(layouts) == 1


@pytest.mark.parametrize("shape, rows", [((128, 128), 64), ((512, 512), 1)])
def test_a_small_product_needs_no_layout(
    shape: tuple[int, int], rows: int, layouts: list[Tensor], calls: list[Tensor]
) -> None:
    x, weight = torch.randn(rows, shape[1]), nn.Parameter(torch.randn(shape))
    with torch.inference_mode(), constant_weights():
        for _ in range(3):
            linear(x, weight)
    assert not layouts
    assert not calls


def test_a_layer(calls: list[Tensor]) -> None:
    layer = Linear(512, 1024)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        assert layer(X) is seen[0] is calls[0]


class Marked(Tensor):
    """A subclass that changes nothing."""


OTHERS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Tensor, Tensor]] = {
    "small": (nullcontext, X[:4], WEIGHT),
    "float64": (nullcontext, X.double(), WEIGHT.double()),
    "bfloat16": (nullcontext, X.bfloat16(), WEIGHT.bfloat16()),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), X, WEIGHT),
    "switched off": (lambda: torch.backends.mkldnn.flags(enabled=False), X, WEIGHT),
    "subclass": (nullcontext, X.as_subclass(Marked), WEIGHT),
    "meta": (nullcontext, X.to("meta"), WEIGHT.to("meta")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_torchs_own(name: str, calls: list[Tensor]) -> None:
    context, x, weight = OTHERS[name]
    with torch.inference_mode(), context():
        expected = nn.functional.linear(x, weight)
        got = linear(x, weight)
        if name == "small":  # but large enough for a weight that was laid out before
            weight = weight[:16]
        with constant_weights():
            also = [linear(x, weight) for _ in range(3)][-1]
    assert not calls
    assert also.dtype == got.dtype == expected.dtype
    assert type(also) is type(got) is type(expected)


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize(
    "bias",
    [torch.randn(2048)[::2], torch.randn(1).expand(1024), torch.randn(1024, 2)[:, 1]],
    ids=["strided", "expanded", "a column"],
)
def test_a_bias_whose_numbers_lie_apart(bias: Tensor, laid_out: bool) -> None:
    """oneDNN took them to lie side by side, and read beyond the end."""
    with torch.inference_mode(), constant_weights() if laid_out else nullcontext():
        for _ in range(3):
            got = linear(X, WEIGHT, bias)
    expected = nn.functional.linear(X.double(), WEIGHT.double(), bias.double()).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_a_weight_that_is_computed_is_not_kept(layouts: list[Tensor], calls: list[Tensor]) -> None:
    with torch.inference_mode(), constant_weights():
        computed = [WEIGHT * factor for factor in (1.0, 2.0)]
        found = [weakref.ref(weight) for weight in computed]
        for weight in computed * 2:
            linear(X[:4], weight)
        del computed, weight
        assert not any(reference() is not None for reference in found)
    assert not layouts


def test_a_copied_context_has_no_old_weights() -> None:
    weight = nn.Parameter(WEIGHT.clone(), requires_grad=False)
    with torch.inference_mode(), constant_weights():
        linear(X, weight), linear(X, weight)
        context = contextvars.copy_context()
    weight.add_(1.0)
    with torch.inference_mode():
        got = context.run(linear, X, weight)
    expected = nn.functional.linear(X.double(), weight.double()).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_a_copied_context_begins_anew(calls: list[Tensor], layouts: list[Tensor]) -> None:
    with constant_weights():
        context = contextvars.copy_context()

    def products() -> None:
        with torch.inference_mode(), constant_weights():
            for _ in range(3):
                linear(X, WEIGHT)

    context.run(products)
    assert len(layouts) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_compiled_in_one_graph(inference: bool) -> None:
    layer = Linear(512, 1024)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.inference_mode(inference):
        assert torch.equal(compiled(X), nn.functional.linear(X, layer.weight, layer.bias))


def test_gradients_are_torchs_own(calls: list[Tensor]) -> None:
    layer = Linear(512, 1024)
    assert layer(X).requires_grad
    with torch.no_grad():
        layer(X)
    assert not calls


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn_linear() is None
    monkeypatch.setattr(module, "_onednn", onednn_linear)
    with torch.inference_mode():
        assert torch.equal(linear(X, WEIGHT), nn.functional.linear(X, WEIGHT))


def test_what_onednn_does_not_take_is_left_to_torch(calls: list[Tensor]) -> None:
    x = X.repeat(2, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(
            linear(x, WEIGHT, BIAS[:1]), nn.functional.linear(x, WEIGHT) + BIAS[0]
        )
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(x[..., 1:], WEIGHT, BIAS)
    assert not calls
