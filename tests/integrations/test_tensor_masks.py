"""Mask tensors of any shape, rank, dtype and pattern mean what torch takes them to mean.

Recognition of padding and bands is compared with the dense path: torch's own function or module, in
float64, with zeros where torch's formula gives NaN, for a query that may attend nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rowmax.kernels import attention_as_sdpa, scaled_dot_product_attention, swapped
from rowmax.kernels.api.masks import Mask
from rowmax.kernels.backends import dispatch
from rowmax.kernels.integrations import tensor_masks
from rowmax.kernels.integrations.huggingface.attention import rowmax_attention

Sizes = tuple[int, int, int, int]
BACKENDS = [name for name in ("reference", "numba", "native") if not dispatch.unavailable(name)]
PATTERNS = (
    *("all", "none", "random", "keys", "queries", "batch", "causal", "window", "causal and keys"),
    *("trailing keys", "leading keys", "last row"),
)


def pattern(name: str, sizes: Sizes, draw: st.DrawFn) -> Tensor:
    """A full bool mask, True = may attend."""
    batch, _, query_len, key_len = sizes
    b = torch.arange(batch).view(-1, 1, 1, 1)
    i = torch.arange(query_len).view(-1, 1)
    j = torch.arange(key_len)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lengths = torch.randint(0, key_len + 1, (batch, 1, 1, 1), generator=generator)
    offset, left = draw(st.integers(-2, key_len)), draw(st.integers(0, key_len))
    found = {
        "all": j >= 0,
        "none": j < 0,
        "random": torch.rand(sizes, generator=generator) < 0.6,
        "keys": j < lengths,
        "queries": i < draw(st.integers(0, query_len)),
        "batch": b < draw(st.integers(0, batch)),
        "causal": j <= i + offset,
        "window": (j <= i + offset) & (j >= i + offset - left),
        "causal and keys": (j <= i + offset) & (j < lengths),
        "trailing keys": j < draw(st.integers(0, key_len)),
        "leading keys": j >= draw(st.integers(0, key_len)),
        "last row": (i < query_len - 1) | (j < lengths),
    }[name]
    return found.expand(sizes).clone()


@st.composite
def masks(draw: st.DrawFn, sizes: Sizes, ranks: tuple[int, ...], dtypes: tuple[str, ...]) -> Tensor:
    """A mask that broadcasts to `sizes`, laid out in some way."""
    allowed = pattern(draw(st.sampled_from(PATTERNS)), sizes, draw)
    for dim in range(4):  # any dimension may be the first of it alone, as 1 or expanded again
        if (form := draw(st.sampled_from(["full", "one", "expanded"]))) != "full":
            allowed = allowed[tuple([slice(None)] * dim + [slice(0, 1)])]
            if form == "expanded":
                allowed = allowed.expand(
                    *allowed.shape[:dim], sizes[dim], *allowed.shape[dim + 1 :]
                )
    for _ in range(4 - draw(st.sampled_from(ranks))):
        allowed = allowed[0]
    if allowed.dim() >= 2 and draw(st.booleans()):
        allowed = allowed.mT.contiguous().mT
    kind = draw(st.sampled_from(dtypes))
    if kind == "bool":
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=torch.float64)
    values = torch.randn(allowed.shape, dtype=torch.float64) if kind == "bias" else zeros
    return values.masked_fill(~allowed, -torch.inf)


sizes_of = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 6), st.integers(1, 9))
many = settings(max_examples=300)
ALL = ("bool", "float", "bias")


def qkv(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, query_len, key_len = sizes
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(
            (batch, heads, length, 4), dtype=torch.float64, generator=generator, requires_grad=True
        )
        for length in (query_len, key_len, key_len)
    )
    return q, k, v


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's formula; zeros for a query that may attend nothing."""
    bias = mask
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    return weights @ v


def with_gradients(call: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    out = call(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- by hypothesis: every way in ------------------------------------------------------------------


@many
@given(st.data())
def test_the_drop_in(data: st.DataObject) -> None:
    sizes = data.draw(sizes_of)
    mask = data.draw(masks(sizes, (0, 1, 2, 3, 4), ALL))
    leaves = qkv(sizes)
    got = with_gradients(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask), *leaves)
    assert_close(got, with_gradients(lambda q, k, v: naive(q, k, v, mask), *leaves))


@many
@given(st.data())
def test_the_drop_in_without_a_batch_or_with_two(data: st.DataObject) -> None:
    sizes = data.draw(sizes_of)
    mask = data.draw(masks(sizes, (4,), ALL))
    q, k, v = qkv(sizes)
    if data.draw(st.booleans()):  # (2, B, H, L, D), and a mask of five dimensions or four
        q, k, v = (t.expand(2, *t.shape) for t in (q, k, v))
        mask = data.draw(st.sampled_from([mask, mask.unsqueeze(0)]))
    else:
        q, k, v, mask = q[0], k[0], v[0], mask[0]
    got = scaled_dot_product_attention(q, k, v, mask)
    assert_close([got], [naive(q, k, v, mask)])


@many
@given(st.data())
def test_the_route(data: st.DataObject) -> None:
    sizes = data.draw(sizes_of)
    mask = data.draw(masks(sizes, (2, 3, 4), ALL))
    leaves = qkv(sizes)
    with attention_as_sdpa():
        got = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), *leaves)
    assert_close(got, with_gradients(lambda q, k, v: naive(q, k, v, mask), *leaves))


@many
@given(st.data())
def test_hugging_face(data: st.DataObject) -> None:
    sizes = data.draw(sizes_of)
    mask = data.draw(masks(sizes, (4,), ALL))
    leaves, module = qkv(sizes), nn.Module()
    got = with_gradients(
        lambda q, k, v: rowmax_attention(module, q, k, v, mask)[0].transpose(1, 2), *leaves
    )
    assert_close(got, with_gradients(lambda q, k, v: naive(q, k, v, mask), *leaves))


def some_key_each(forbidden: Tensor) -> Tensor:
    """The same, but every query may attend key 0: torch's modules give NaN where there is none."""
    return forbidden.index_fill(-1, torch.tensor([0]), False)


@st.composite
def torch_masks(
    draw: st.DrawFn, batch: int, heads: int, query_len: int, key_len: int, *, each: bool
) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask and key_padding_mask as torch's modules take them: True forbids."""
    additive = draw(st.booleans())

    def in_its_dtype(forbidden: Tensor) -> Tensor:
        if not additive:
            return forbidden
        zeros = torch.zeros(forbidden.shape, dtype=torch.float64)
        return zeros.masked_fill(forbidden, -torch.inf)

    found: list[Tensor | None] = [None, None]
    if draw(st.booleans()):
        pairs = draw(masks((batch, heads, query_len, key_len), (4,) if each else (2,), ("bool",)))
        pairs = pairs.expand(batch, heads, query_len, key_len)
        pairs = pairs.flatten(0, 1) if each and draw(st.booleans()) else pairs[0, 0]
        found[0] = in_its_dtype(some_key_each(~pairs))
    if draw(st.booleans()):
        keys = draw(masks((1, 1, batch, key_len), (2,), ("bool",))).expand(batch, key_len)
        found[1] = in_its_dtype(some_key_each(~keys))
    return found[0], found[1]


def assert_swapped_as_before(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    def results() -> list[Tensor]:
        parameters = list(module.parameters())
        out = call(module)
        gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        return [out, *(gradient for gradient in gradients if gradient is not None)]

    with sdpa_kernel(SDPBackend.MATH):
        expected = results()
    with swapped(module):
        assert_close(results(), expected)


@many
@given(st.data())
def test_multihead_attention(data: st.DataObject) -> None:
    batch, heads, query_len, key_len = data.draw(sizes_of)
    attn_mask, padding = data.draw(torch_masks(batch, heads, query_len, key_len, each=True))
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, heads, batch_first=True, dtype=torch.float64)
    x, y = (torch.randn(batch, length, 8).double() for length in (query_len, key_len))
    need_weights = data.draw(st.booleans())

    def call(own: nn.Module) -> Tensor:
        out, weights = own(
            *(x, y, y), attn_mask=attn_mask, key_padding_mask=padding, need_weights=need_weights
        )
        return out if weights is None else torch.cat((out.flatten(), weights.flatten()))

    assert_swapped_as_before(module, call)


@many
@given(st.data())
def test_encoders_and_decoders(data: st.DataObject) -> None:
    batch, heads, query_len, key_len = data.draw(sizes_of)
    own_mask, own_padding = data.draw(torch_masks(batch, heads, query_len, query_len, each=False))
    mask, padding = data.draw(torch_masks(batch, heads, query_len, key_len, each=False))
    torch.manual_seed(0)
    options: dict[str, Any] = {"batch_first": True, "dtype": torch.float64, "dropout": 0.0}
    x, y = (torch.randn(batch, length, 8).double() for length in (query_len, key_len))
    encoder = nn.TransformerEncoderLayer(8, heads, 16, **options)
    assert_swapped_as_before(
        nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
        lambda own: own(x, mask=own_mask, src_key_padding_mask=own_padding),
    )
    assert_swapped_as_before(
        nn.TransformerDecoder(nn.TransformerDecoderLayer(8, heads, 16, **options), 1),
        lambda own: own(
            *(x, y),
            tgt_mask=own_mask,
            tgt_key_padding_mask=own_padding,
            memory_mask=mask,
            memory_key_padding_mask=padding,
        ),
    )


# --- by example -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 4, 1, dtype=torch.bool),
        torch.ones(4, 1, dtype=torch.bool),
        torch.tensor([True, False]).view(2, 1, 1, 1),
        torch.tensor([True, True, False, False]).view(4, 1),
        torch.tensor([True, True, False, False]),
        torch.tensor(False),
    ],
    ids=lambda mask: f"{tuple(mask.shape)}",
)
@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_one_key_and_without_a_batch(backend: str, mask: Tensor, additive: bool) -> None:
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    leaves = qkv((2, 2, 4, 4))
    got = with_gradients(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, backend=backend), *leaves
    )
    assert_close(got, with_gradients(lambda q, k, v: naive(q, k, v, mask), *leaves))


@pytest.mark.parametrize("name", ["attn_mask", "src_mask", "memory_mask"])
def test_trailing_keys_hidden_from_a_whole_batch(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8).double()
    mask = torch.tensor([[0, 1, 1]] * 3).bool()
    options: dict[str, Any] = {"batch_first": True, "dtype": torch.float64}
    if name == "attn_mask":
        module: nn.Module = nn.MultiheadAttention(8, 2, **options)
        assert_swapped_as_before(module, lambda own: own(x, x, x, attn_mask=mask)[0])
    elif name == "src_mask":
        module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
        assert_swapped_as_before(module, lambda own: own(x, src_mask=mask))
    else:
        module = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, **options)
        assert_swapped_as_before(module, lambda own: own(x, x, memory_mask=mask))


def through_numpy(mask: Tensor, new: Tensor) -> None:
    mask.numpy()[...] = new.numpy()


def through_data(mask: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        mask.data.copy_(new)


@pytest.mark.parametrize("key_len", [9, 70_000], ids=["small", "large"])
@pytest.mark.parametrize("write", [through_numpy, through_data, Tensor.copy_])
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_refilled_is_read_again(
    key_len: int, write: Callable[[Tensor, Tensor], object], inference: bool
) -> None:
    """A decode loop refills a preallocated mask; torch keeps no version of an inference tensor."""
    with torch.inference_mode(inference), torch.no_grad():
        q, k, v = (t.clone() for t in qkv((1, 1, 1, key_len)))
        mask = torch.zeros(1, 1, 1, key_len, dtype=torch.bool)
        bias = torch.zeros(1, 1, 1, key_len, dtype=torch.float64)
        module = nn.Module()
        for length in (3, key_len, 5):
            allowed = (torch.arange(key_len) < length).view(mask.shape)
            write(mask, allowed)
            write(bias, torch.zeros(mask.shape).double().masked_fill(~allowed, -torch.inf))
            expected = naive(q, k, v, allowed)
            assert_close([scaled_dot_product_attention(q, k, v, mask)], [expected])
            assert_close([rowmax_attention(module, q, k, v, bias)[0].transpose(1, 2)], [expected])


def test_zeros_that_stand_for_no_bias_are_read_again() -> None:
    """T5 passes zeros where a layer has no position bias."""
    q, k, v = qkv((1, 2, 4, 6))
    bias = torch.zeros(1, 2, 4, 6, dtype=torch.float64)
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    for value in (0.0, 1.5):
        bias.numpy()[..., 2] = value
        got = rowmax_attention(module, q, k, v, None, position_bias=bias)[0]
        assert_close([got.transpose(1, 2)], [naive(q, k, v, bias)])


@pytest.mark.parametrize("key_len", [9, 40_000], ids=["small", "large"])
def test_what_is_remembered_in_inference_mode_serves_training(key_len: int) -> None:
    mask = torch.arange(key_len) < torch.tensor([[7], [4]]).view(2, 1, 1, 1)
    q, k, v = leaves = qkv((2, 2, 3, key_len))
    with torch.inference_mode():
        scaled_dot_product_attention(q, k, v, mask)
    got = with_gradients(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask), *leaves)
    assert_close(got, with_gradients(lambda q, k, v: naive(q, k, v, mask), *leaves))


@pytest.mark.parametrize("length", [64, 512], ids=["small", "large"])
def test_the_layers_of_a_model_share_what_a_mask_means(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    recognise = tensor_masks._recognise

    def counted(mask: Tensor, sizes: tensor_masks.Sizes) -> tuple[bool, Mask | None]:
        seen.append(mask)
        return recognise(mask, sizes)

    monkeypatch.setattr(tensor_masks, "_recognise", counted)
    tensor_masks._recognise_values.cache_clear()
    tensor_masks._recent.clear()
    sizes = (1, 2, length, length)
    allowed = torch.ones(1, 1, length, length, dtype=torch.bool).tril_()
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    for _layer in range(3):
        assert named(tensor_masks.mask_of(allowed.clone(), sizes)) == ["Causal"]
        assert named(tensor_masks.mask_of_forbidden(bias.clone(), sizes)) == ["Causal"]
    assert len(seen) == 2
    tensor_masks.mask_of(allowed, (3, *sizes[1:]))
    assert len(seen) == 3


# --- what is recognised, so that kernels skip it --------------------------------------------------


def named(mask: Mask | Tensor | None) -> list[str]:
    if mask is None or isinstance(mask, Tensor):
        return [] if mask is None else ["bias"]
    return sorted(type(part).__name__ for part in mask.parts())


@pytest.mark.parametrize("length", [6, 512], ids=["small", "large"])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    "kind,expected",
    [
        ("all", []),
        ("keys", ["KeyLengths"]),
        ("keys, written out", ["KeyLengths"]),
        ("keys of the batch", ["KeyLengths"]),
        ("causal", ["Causal"]),
        ("causal, shifted", ["Causal"]),
        ("causal and keys", ["Causal", "KeyLengths"]),
        ("window", ["Window"]),
        ("window and keys", ["KeyLengths", "Window"]),
        ("one query", []),
        ("random", ["Dense"]),
        ("each head", ["Dense"]),
    ],
)
def test_structure_is_found(kind: str, expected: list[str], additive: bool, length: int) -> None:
    i, j = torch.arange(length).view(-1, 1), torch.arange(length)
    keys = (j < torch.tensor([[length], [length // 2]])).view(2, 1, 1, length)
    allowed = {
        "all": torch.ones(length, length, dtype=torch.bool),
        "keys": keys,
        "keys, written out": keys.expand(-1, -1, length, -1).clone(),
        "keys of the batch": j < length // 2,
        "causal": j <= i,
        "causal, shifted": j <= i + 2,
        "causal and keys": (j <= i) & keys,
        "window": (j <= i) & (j >= i - 2),
        "window and keys": (j <= i) & (j >= i - 2) & keys,
        "one query": torch.ones(length, 1, dtype=torch.bool),
        "random": torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.5,
        "each head": (j <= i).expand(2, 4, length, length).clone(),
    }[kind]
    allowed = allowed.view((1,) * (4 - allowed.dim()) + tuple(allowed.shape))
    sizes = (2, 4, length, length)
    if additive:
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        expected = ["bias"] if expected == ["Dense"] else expected
        assert named(tensor_masks.mask_of_forbidden(bias, sizes)) == expected
    else:
        assert named(tensor_masks.mask_of(allowed, sizes)) == expected
        assert named(tensor_masks.mask_of_forbidden(~allowed, sizes)) == expected


def zeros_without_memory() -> Tensor:
    """As autograd makes them: the gradient of `sgn`."""
    a = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(torch.sgn(a).sum(), a)[0]


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1).double().expand(4, 4),
        torch.zeros(()).double().expand(4, 4),
        torch.zeros(4, 3).double()[:, ::3].expand(4, 4),
        torch.zeros(4, 8).double()[:, ::2],
        zeros_without_memory(),
        torch._neg_view(torch.zeros(4, 4).double()),
    ],
    ids=["one", "scalar", "column", "steps", "no memory", "negated"],
)
def test_masks_of_any_memory(mask: Tensor) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8).double()
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    assert_swapped_as_before(module, lambda own: own(x, x, x, attn_mask=mask)[0])
    q, k, v = qkv((1, 2, 4, 4))
    with attention_as_sdpa():
        got = F.scaled_dot_product_attention(q, k, v, mask)
    assert_close([got], [naive(q, k, v, mask)])
