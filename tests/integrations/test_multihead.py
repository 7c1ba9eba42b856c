"""A swapped nn.MultiheadAttention against torch's own, over its arguments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowmax.kernels import swap

from .support import assert_same, results

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 3, 5, 7
MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 10, "vdim": 8},
    "add_bias_kv": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True},
    "all at once": {"kdim": 10, "vdim": 8, "add_bias_kv": True, "add_zero_attn": True},
}
INPUTS = ("self", "cross, k is v", "cross")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def build(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():  # biases begin at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def tensors(kind: str, options: dict[str, Any], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    key_dim, value_dim = options.get("kdim", EMBED), options.get("vdim", EMBED)
    if kind == "self":
        query = key = value = randn(BATCH, QUERIES, EMBED)
    else:
        query, key = randn(BATCH, QUERIES, EMBED), randn(BATCH, KEYS, key_dim)
        value = key if kind == "cross, k is v" else randn(BATCH, KEYS, value_dim)
    if layout == "batch_first":
        return query, key, value
    seen: dict[int, Tensor] = {}
    for tensor in (query, key, value):
        seen[id(tensor)] = tensor.transpose(0, 1) if layout == "batch second" else tensor[0]
    return seen[id(query)], seen[id(key)], seen[id(value)]


def masks(kind: str, queries: int, keys: int, layout: str) -> dict[str, Tensor]:
    """Masks of both dtypes; no row of them forbids everything."""
    batch = 1 if layout == "unbatched" else BATCH
    padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2], [2]])[:batch]
    square = torch.rand(queries, keys) < 0.3
    square[:, 0] = False
    each = torch.rand(batch * HEADS, queries, keys) < 0.3
    each[:, :, 0] = False
    padding = padding[0] if layout == "unbatched" else padding
    infinite = torch.zeros(keys, dtype=torch.float64).masked_fill(padding, -torch.inf)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "additive padding": {"key_padding_mask": infinite},
        "bias of keys": {"key_padding_mask": torch.randn(padding.shape, dtype=torch.float64)},
        "pairs": {"attn_mask": square},
        "pairs of each head": {"attn_mask": each},
        "bias": {"attn_mask": randn(queries, keys)},
        "both": {"key_padding_mask": padding, "attn_mask": square},
        "both, additive": {"key_padding_mask": infinite, "attn_mask": randn(queries, keys)},
    }[kind]


MASKS = (
    *("none", "padding", "additive padding", "bias of keys", "pairs", "pairs of each head"),
    *("bias", "both", "both, additive"),
)


def assert_like_torch(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> None:
    """Output, weights and gradients of the swapped module, and of the original again after it."""

    def call(own: nn.Module) -> Tensor:
        out, weights = own(*args, **kwargs)
        if weights is None:
            return out
        return torch.cat((out.flatten(), weights.flatten()))

    def shapes() -> list[tuple[int, ...] | None]:
        return [None if item is None else tuple(item.shape) for item in module(*args, **kwargs)]

    expected, expected_shapes = results(module, call), shapes()
    report = swap(module)
    assert_same(results(module, call), expected)
    assert shapes() == expected_shapes
    report.restore()
    assert torch.equal(call(module), expected["the output"])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["batch_first", "batch second", "unbatched"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_like_torch(options: dict[str, Any], layout: str, mask: str) -> None:
    module = build(batch_first=layout == "batch_first", **options)
    kinds = INPUTS if "kdim" not in options else INPUTS[2:]
    torch.manual_seed(1)
    for kind, weights in itertools.product(kinds, (False, True)):
        query, key, value = tensors(kind, options, layout)
        keys = QUERIES if kind == "self" else KEYS
        given = masks(mask, QUERIES, keys, layout)
        assert_like_torch(
            module,
            *(query, key, value),
            **given,
            need_weights=weights,
            average_attn_weights=False,
        )


@pytest.mark.parametrize("average", [False, True])
def test_weights_are_averaged_as_asked(average: bool) -> None:
    query = randn(BATCH, QUERIES, EMBED)
    module = build(batch_first=True)
    assert_like_torch(module, query, query, query, average_attn_weights=average)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_the_causal_hint(options: dict[str, Any], need_weights: bool, padded: bool) -> None:
    if "kdim" in options:
        options = {name: value for name, value in options.items() if name not in ("kdim", "vdim")}
    module, query = build(batch_first=True, **options), randn(BATCH, QUERIES, EMBED)
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    given = {"key_padding_mask": torch.arange(QUERIES) >= torch.tensor([[5], [3], [1]])}
    assert_like_torch(
        module,
        *(query, query, query),
        attn_mask=mask,
        is_causal=True,
        need_weights=need_weights,
        **(given if padded else {}),
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_a_fully_padded_row_gives_zeros(need_weights: bool, additive: bool) -> None:
    """torch gives NaN for it; the other batch elements are not touched."""
    module, query = nn.MultiheadAttention(EMBED, HEADS, batch_first=True), torch.randn(2, 5, EMBED)
    padding = torch.tensor([[False] * 4 + [True], [True] * 5])
    mask = torch.zeros(2, 5).masked_fill(padding, -torch.inf) if additive else padding
    expected = module(query[:1], query[:1], query[:1], key_padding_mask=padding[:1])
    swap(module)
    out, weights = module(query, query, query, key_padding_mask=mask, need_weights=need_weights)
    assert torch.equal(out[1], torch.zeros(5, EMBED))  # the bias of the projection begins at zero
    torch.testing.assert_close(out[:1], expected[0])
    if need_weights:
        assert torch.equal(weights[1], torch.zeros(5, 5))
        torch.testing.assert_close(weights[:1], expected[1])
    out.sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients)


def test_dropout_is_that_of_the_kernels_and_follows_the_mode() -> None:
    module = nn.MultiheadAttention(EMBED, HEADS, dropout=0.5, batch_first=True)
    query = torch.randn(2, 5, EMBED)
    swap(module)
    torch.manual_seed(3)
    first, _ = module(query, query, query, need_weights=False)
    torch.manual_seed(3)
    again, _ = module(query, query, query, need_weights=False)
    other, _ = module(query, query, query, need_weights=False)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    module.eval()
    assert torch.equal(*(module(query, query, query, need_weights=False)[0] for _ in range(2)))


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ({"is_causal": True}, ValueError, "`is_causal`"),
        ({"attn_mask": torch.zeros(4, 5)}, ValueError, "`attn_mask`: expected shape"),
        ({"key_padding_mask": torch.zeros(2, 4)}, ValueError, "`key_padding_mask`: expected shape"),
        ({"attn_mask": torch.zeros(5, 5).long()}, TypeError, "a bool or float mask"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    module, query = nn.MultiheadAttention(EMBED, HEADS, batch_first=True), torch.randn(2, 5, EMBED)
    swap(module)
    with pytest.raises(error, match=message):
        module(query, query, query, **arguments)
    with pytest.raises(ValueError, match=f"expected {EMBED} features"):
        module(query[..., :6], query, query)
    with pytest.raises(ValueError, match="3 dimensions"):
        module(query, query[0], query[0])
