"""Linear maps by oneDNN: the same numbers, and only where torch's own are not needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowmax.kernels.ops.torch_internals import onednn_linear
from rowmax.transformer import linear as module
from rowmax.transformer.linear import Linear, linear

X, WEIGHT, BIAS = torch.randn(32, 2, 512), torch.randn(1024, 512), torch.randn(1024)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What oneDNN gave, in a torch that has it."""
    by_onednn = onednn_linear()
    if by_onednn is None:
        pytest.skip("this torch has no oneDNN")
    found: list[Tensor] = []

    def spy(*arguments: Any) -> Tensor:
        found.append(by_onednn(*arguments))
        return found[-1]

    monkeypatch.setattr(module, "_by_onednn", lambda: spy)
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
        got, expected = linear(x, weight), nn.functional.linear(x, weight)
    assert not calls
    assert type(got) is type(expected)
    assert got.dtype == expected.dtype


def test_gradients_are_torchs_own(calls: list[Tensor]) -> None:
    layer = Linear(512, 1024)
    assert layer(X).requires_grad
    with torch.no_grad():
        layer(X)
    assert not calls


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn_linear() is None
    monkeypatch.setattr(module, "_by_onednn", onednn_linear)
    with torch.inference_mode():
        assert torch.equal(linear(X, WEIGHT), nn.functional.linear(X, WEIGHT))
