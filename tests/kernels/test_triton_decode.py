"""Attention with its keys split over programs: few queries, many keys.

Chunks are of 64 keys here, of which the split wants two, so that short sequences have several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rowmax.kernels as rk
from rowmax.kernels.backends import dispatch

from .backends import device_of, dtype_name
from .cases import (
    Case,
    Shape,
    alibi,
    always,
    bias_with,
    documents,
    lengths,
    random_bias,
    random_dense,
)
from .support import AttentionCase, assert_parity, run

if dispatch.unavailable("triton") is not None:
    pytest.skip(str(dispatch.unavailable("triton")), allow_module_level=True)

from rowmax.kernels.backends.gpu_triton import attention_decode, attention_launch

DEVICE = device_of("triton")
CHUNK = 64


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel that does not split the keys is out of reach; fresh memory holds NaN."""
    for module in (attention_decode, attention_launch):
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr(attention_launch, "forward", None)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


FEW = Shape(2, 4, 2, 2, 130, 16, 16)  # three chunks, the last one short
LAST = always(rk.Causal("lower_right"))
RAGGED = always(rk.Causal(lengths(120, 20)) & rk.KeyLengths(lengths(122, 22)))


def _cases() -> Iterator[Case]:
    shapes = {
        "one_query": Shape(2, 1, 1, 1, 150, 16, 16),
        "two_chunks": Shape(1, 1, 1, 1, 128, 16, 16),
        "gqa": FEW,
        "mqa_full": Shape(1, 8, 1, 8, 130, 16, 16),  # as many rows as a split takes
        "rows_between_tiles": Shape(1, 5, 1, 7, 130, 8, 8),
        "dv_more": Shape(1, 4, 2, 2, 130, 7, 40),
        "dv_one": Shape(1, 4, 2, 2, 130, 40, 1),
        "d0": Shape(1, 2, 2, 2, 130, 0, 8),
        "dv0": Shape(1, 2, 2, 2, 130, 8, 0),
        "no_batch": Shape(0, 2, 2, 1, 130, 8, 8),
        "no_queries": Shape(1, 2, 2, 0, 130, 8, 8),
    }
    yield from (Case(name, shape) for name, shape in shapes.items())
    for layout in ("heads_last", "strided", "expanded"):
        yield Case(f"layout_{layout}", FEW, LAST, layout=layout)
    masks: dict[str, Any] = {
        "causal": LAST,
        "causal_dead_rows": always(rk.Causal(-2)),
        "causal_first_chunk": always(rk.Causal("upper_left")),
        "window": always(rk.Window(40, 0, "lower_right")),
        "window_in_a_chunk": always(rk.Window(3, 2, 70)),
        "window_per_batch": always(rk.Window(30, 5, lengths(100, 20))),
        "ragged": RAGGED,
        "keys_none_and_all": always(rk.KeyLengths(lengths(0, 130))),
        "queries": always(rk.QueryLengths(lengths(1, 0)) & rk.Causal("lower_right")),
        "disjoint_bands": always(rk.Causal(-4) & rk.Window(0, 2, "upper_left")),
        "dense": random_dense(True, True, True, True),
        "dense_keys": random_dense(False, False, False, True),
        "dense_none": lambda shape, generator: torch.zeros(1, 1, dtype=torch.bool),
        "dense_sparse": lambda s, g: rk.Dense(torch.rand(s.scores, generator=g) < 0.01),
        "documents": documents,
    }
    yield from (Case(name, FEW, mask) for name, mask in masks.items())
    yield Case("bias_full", FEW, bias=random_bias(True, True, True, True))
    yield Case("bias_heads", FEW, LAST, random_bias(False, True, False, True))
    yield Case("bias_minus_inf", FEW, bias=bias_with(-torch.inf, lambda d: d < 80))
    yield Case("alibi", FEW, RAGGED, alibi(lengths(120, 20)))
    yield Case("alibi_per_batch", FEW, bias=alibi("lower_right", per_batch=True))
    yield Case("softcap", FEW, LAST, options={"softcap": 1.5})
    yield Case("sinks", FEW, sinks=True)
    yield Case("sinks_dead_rows", FEW, always(rk.KeyLengths(lengths(0, 70))), sinks=True)
    yield Case("dropout", FEW, options={"dropout_p": 0.4, "seed": 11})
    yield Case("dropout_all", FEW, LAST, options={"dropout_p": 1.0, "seed": 2})
    yield Case("scores_huge", FEW, factor=1000.0)
    yield Case("scores_negative", FEW, options={"scale": -2.0})
    yield Case(
        "everything",
        Shape(2, 6, 2, 3, 130, 16, 24),
        lambda s, g: (
            rk.Causal(lengths(127, 60))
            & rk.KeyLengths(lengths(129, 63))
            & rk.Dense(random_dense(True, True, True, True)(s, g))
        ),
        random_bias(False, True, True, True),
        sinks=True,
        options={"softcap": 2.0, "dropout_p": 0.2, "seed": 9, "scale": 0.3},
        layout="heads_last",
    )


CASES = list(_cases())
BY_NAME = {case.name: case for case in CASES}


def forward_only(arguments: AttentionCase) -> AttentionCase:
    return replace(arguments, grad_out=None, grad_lse=None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: Case) -> None:
    arguments = forward_only(case.build(torch.float64, DEVICE))
    assert_parity(run("triton", arguments), arguments)


def test_gradients() -> None:
    """The backward pass is the ordinary one; it takes the lse that the chunks gave."""
    arguments = BY_NAME["ragged"].build(torch.float64, DEVICE)
    assert_parity(run("triton", arguments), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("name", ["gqa", "ragged", "scores_huge", "everything"])
def test_parity_of_narrow_types(name: str, dtype: torch.dtype) -> None:
    arguments = forward_only(BY_NAME[name].build(dtype, DEVICE))
    assert_parity(run("triton", arguments), arguments)


def test_what_is_dropped_is_what_the_reference_drops() -> None:
    """Values of 1 after a softmax of equal scores: each output counts the weights kept."""
    q, k, v = (torch.zeros(2, heads, length, 8, device=DEVICE) for heads, length in SIZES)
    options: dict[str, Any] = {"dropout_p": 0.5, "seed": -(2**40) - 3}
    expected = rk.attention(q, k, v + 1, backend="reference", **options)
    got = rk.attention(q, k, v + 1, backend="triton", **options)
    assert torch.equal((got * 130 / 2).round(), (expected * 130 / 2).round())
    assert len(got.unique()) > 5


SIZES = ((4, 3), (2, 130), (2, 130))

PADDING: dict[str, rk.Mask | Tensor] = {
    "keys": rk.KeyLengths(lengths(0, 70)),
    "ragged": rk.Causal(lengths(64, 100)) & rk.KeyLengths(lengths(66, 101)),
    "window": rk.Window(20, 0, lengths(-1, 80)),
    "dense": (torch.arange(130) % 7 == 0) & (torch.arange(130) > 66),
    "dense_rows": rk.Dense(torch.tensor([[False], [True]]) & (torch.arange(130) != 9)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", PADDING)
def test_what_nobody_uses_may_hold_anything(name: str, dtype: torch.dtype) -> None:
    mask = PADDING[name]
    case = Case("padded", FEW, lambda shape, generator: mask)
    clean = forward_only(case.build(dtype, DEVICE))
    allowed = mask.dense(*FEW.scores) if isinstance(mask, rk.Mask) else mask.expand(FEW.scores)
    allowed = allowed.expand(FEW.scores).to(DEVICE)
    unused = ~allowed.any(2).any(1)[:, None, :, None]
    empty = ~allowed.any(-1, keepdim=True)
    assert unused.any()

    def with_padding(value: float) -> AttentionCase:
        q, k, v = clean.q, clean.k, clean.v
        q = q.masked_fill(empty, value)
        return replace(clean, q=q, k=k.masked_fill(unused, value), v=v.masked_fill(unused, value))

    expected = run("triton", with_padding(0.0))
    poison = torch.nan if dtype == torch.float64 else torch.inf
    for key, tensor in run("triton", with_padding(poison)).items():
        assert torch.equal(tensor, expected[key]), key
    assert (expected["out"][empty.squeeze(-1)] == 0).all()
    assert (expected["lse"][empty.squeeze(-1)] == -torch.inf).all()


def test_a_value_that_is_not_finite_reaches_the_rows_that_attend_it() -> None:
    arguments = forward_only(BY_NAME["causal"].build(torch.float32, DEVICE))
    arguments.q[0, 3, 1] = torch.nan
    arguments.k[1, 0, 129] = torch.nan  # which the last query alone may attend
    out = run("triton", arguments)["out"].isnan().any(-1)
    expected = torch.zeros_like(out)
    expected[0, 3, 1] = expected[1, :2, 1] = True
    assert torch.equal(out, expected)


def test_results_do_not_depend_on_the_batch() -> None:
    """Bitwise the same alone, in a batch, and in a cache that is longer than it needs to be."""
    generator = torch.Generator().manual_seed(8)
    sizes = ((2, 2, 2, 24), (2, 1, 200, 24), (2, 1, 200, 24))
    q, k, v = (torch.randn(size, generator=generator).to(DEVICE) for size in sizes)
    held = torch.tensor([200, 131], device=DEVICE)
    options: dict[str, Any] = {"return_lse": True, "backend": "triton"}
    mask = rk.Causal(held - 2) & rk.KeyLengths(held)
    together = rk.attention(q, k, v, mask, **options)
    for b, length in enumerate(held.tolist()):
        one = slice(b, b + 1)
        alone = rk.attention(
            q[one], k[one, :, :length], v[one, :, :length], rk.Causal("lower_right"), **options
        )
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part, whole[one])


QUERIES, KEYS = [1, 0, 2, 1], [70, 5, 131, 0]
PACKED: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"mask": rk.Causal("lower_right")},
    "window_alibi": {
        "mask": rk.Window(30, 2, "lower_right"),
        "bias": rk.ALiBi(torch.tensor([0.5, 0.125]), "lower_right"),
    },
    "dropout_softcap": {"dropout_p": 0.3, "seed": 5, "softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.3, -1.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str) -> None:
    generator = torch.Generator().manual_seed(9)
    sizes = ((sum(QUERIES), 2, 16), (sum(KEYS), 1, 16), (sum(KEYS), 1, 20))
    q, k, v = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE) for size in sizes
    )
    starts_q, starts_k = (
        torch.tensor([0, *counts], device=DEVICE).cumsum(0).int() for counts in (QUERIES, KEYS)
    )
    options: dict[str, Any] = dict(PACKED[name])
    if "bias" in options:
        options["bias"] = rk.ALiBi(options["bias"].slopes.to(DEVICE), options["bias"].align)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(DEVICE)

    def both(backend: str) -> tuple[Tensor, Tensor]:
        return rk.attention_varlen(
            q, k, v, starts_q, starts_k, return_lse=True, backend=backend, **options
        )

    for got, expected in zip(both("triton"), both("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    splits = attention_decode.splits_keys
    assert splits(1, 1, 1024)
    assert splits(8, 8, 100_000)
    assert not splits(1, 1, 1023)
    assert not splits(9, 8, 100_000)


def test_chunks_of_the_usual_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Case("usual", Shape(1, 2, 1, 1, 1100, 16, 16), LAST)
    for dtype in (torch.float64, torch.bfloat16):
        arguments = forward_only(case.build(dtype, DEVICE))
        assert_parity(run("triton", arguments), arguments)


def test_large_sinks_lose_no_digits() -> None:
    # softmax over n scores of 0 and a sink s: out = n / (e^s + n)
    sinks = torch.linspace(20.0, 60.0, 16, device=DEVICE)
    zeros, n = torch.zeros(1, 16, 1, 8, device=DEVICE), 2 * CHUNK + 2
    values = torch.ones(1, 16, n, 8, device=DEVICE)
    out = rk.attention(zeros, torch.zeros_like(values), values, sinks=sinks, backend="triton")
    exact = n / (sinks.double().exp() + n)
    bound = 4 * torch.finfo(torch.float32).eps
    assert ((out[0, :, 0, 0].double() / exact - 1).abs() < bound).all()
