"""Properties of attention that hold for any input, on inputs that hypothesis makes up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rowmax.kernels as rk

from .backends import dtype_name, is_interpreted
from .cases import Case, Shape
from .derivative_cases import COMPILED
from .support import AttentionCase, assert_parity, run

LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 129, 257]))  # several tiles

shapes = st.builds(
    lambda groups, **sizes: Shape(Hq=groups * sizes["Hkv"], **sizes),
    groups=st.integers(1, 3),
    B=st.integers(1, 3),
    Hkv=st.integers(1, 2),
    Lq=LENGTHS,
    Lk=LENGTHS,
    D=st.integers(1, 20),
    Dv=st.integers(1, 20),
)
aligns: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(["upper_left", "lower_right"]), st.integers(-20, 40), st.integers(-300, 300)
)


def integers(shape: tuple[int, ...], low: int, high: int) -> st.SearchStrategy[Tensor]:
    size = torch.Size(shape).numel()
    numbers = st.lists(st.integers(low, high), min_size=size, max_size=size)
    return numbers.map(lambda values: torch.tensor(values, dtype=torch.int64).view(shape))


def random_dense_mask(size: tuple[int, ...], seed: int) -> rk.Mask:
    return rk.Dense(torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.7)


def random_documents(shape: Shape, seed: int) -> rk.Mask:
    generator = torch.Generator().manual_seed(seed)
    return rk.Documents(
        torch.randint(3, (shape.B, shape.Lq), generator=generator),
        torch.randint(3, (shape.B, shape.Lk), generator=generator),
    )


@st.composite
def masks(draw: st.DrawFn, shape: Shape) -> rk.Mask:
    """A conjunction of one to three masks of any kind."""
    per_batch = st.one_of(integers((shape.B,), -10, 50), integers((shape.B,), -20, 300))
    side = st.one_of(st.none(), st.integers(0, 12), st.integers(0, 200))
    kinds = [
        st.builds(rk.Causal, st.one_of(aligns, per_batch)),
        st.builds(rk.Window, side, side, st.one_of(aligns, per_batch)),
        st.builds(rk.KeyLengths, per_batch),
        st.builds(rk.QueryLengths, per_batch),
        st.builds(
            random_dense_mask,
            st.tuples(*(st.sampled_from([1, size]) for size in shape.scores)),
            st.integers(0, 999),
        ),
        st.builds(random_documents, st.just(shape), st.integers(0, 999)),
    ]
    one = st.one_of(kinds)
    joined, *others = draw(st.lists(one, min_size=1, max_size=3))
    for other in others:
        joined = joined & other
    free = not any(part.bounds_keys_above() for part in joined.parts())
    if free and draw(st.booleans()):
        joined = joined & draw(st.builds(rk.Causal, st.one_of(aligns, per_batch), per_batch))
    return joined


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> AttentionCase:
    """Any mask, and bias, sinks, softcap, scale and dropout each now and then."""

    def now_and_then() -> bool:
        return draw(st.integers(0, 3)) == 0

    shape = draw(shapes)
    mask = draw(st.one_of(st.none(), masks(shape)))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1, 1))
    if draw(st.booleans()):
        options |= {
            "dropout_p": draw(st.floats(0, 1)),
            "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        }
    if now_and_then():
        options["softcap"] = draw(st.floats(0.1, 10))
    bias_size = draw(
        st.one_of(st.none(), st.tuples(*(st.sampled_from([1, n]) for n in shape.scores)))
    )
    case = Case(
        f"hypothesis {draw(st.integers(0, 999))}",
        shape,
        None if mask is None else lambda shape, generator: mask,
        None if bias_size is None else lambda shape, draw_tensor: draw_tensor(*bias_size),
        sinks=now_and_then(),
        options=options,
        layout=draw(st.sampled_from(["plain", "heads_last", "strided", "transposed"])),
    )
    arguments = case.build(dtype)
    if bias_size is None and now_and_then():
        slopes = torch.rand(shape.Hq, dtype=dtype, generator=torch.Generator().manual_seed(1))
        arguments = replace(arguments, bias=rk.ALiBi(slopes, draw(aligns)))
    return arguments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_any_combination_agrees_with_the_oracle(backend: str, dtype: torch.dtype) -> None:
    @settings(max_examples=8 if is_interpreted(backend) else 80)
    @given(problems(dtype))
    def check(arguments: AttentionCase) -> None:
        assert_parity(run(backend, arguments), arguments)

    check()


simple = st.builds(
    lambda shape, number: Case(f"simple {number}", shape).build(torch.float64),
    shapes,
    st.integers(0, 999),
)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@COMPILED
@given(arguments=simple, seed=st.integers(0, 999))
def test_the_order_of_keys_does_not_matter(
    backend: str, arguments: AttentionCase, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(arguments.shape[3], generator=generator)
    mask = torch.rand(arguments.shape, generator=generator) < 0.7
    plain = run(backend, replace(arguments, mask=mask))
    moved = run(
        backend,
        replace(
            arguments, k=arguments.k[:, :, order], v=arguments.v[:, :, order], mask=mask[..., order]
        ),
    )
    for name in ("out", "lse", "d_q"):
        close(moved[name], plain[name])
    for name in ("d_k", "d_v"):
        close(moved[name], plain[name][:, :, order])


@COMPILED
@given(arguments=simple, shift=st.floats(-50, 50))
def test_a_shift_of_a_row_moves_its_lse_alone(
    backend: str, arguments: AttentionCase, shift: float
) -> None:
    rows = torch.full((*arguments.shape[:3], 1), shift, dtype=torch.float64)
    plain, shifted = run(backend, arguments), run(backend, replace(arguments, bias=rows))
    close(shifted["lse"], plain["lse"] + shift)
    for name in ("out", "d_q", "d_k", "d_v"):
        torch.testing.assert_close(shifted[name], plain[name], rtol=1e-11, atol=1e-12)


@COMPILED
@given(arguments=problems(torch.float32))
def test_a_batch_element_does_not_know_its_batch(backend: str, arguments: AttentionCase) -> None:
    """Bitwise, on fused backends, and without dropout, which counts batch elements."""
    options = {key: value for key, value in arguments.options.items() if key == "scale"}
    arguments = replace(arguments, mask=None, bias=None, sinks=None, options=options)
    together = run(backend, arguments)
    for b in range(arguments.shape[0]):
        one = slice(b, b + 1)
        for name, tensor in run(backend, arguments.of_batch(one)).items():
            if backend == "reference":  # torch's batched products do depend on the batch
                torch.testing.assert_close(tensor, together[name][one], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(tensor, together[name][one]), name


@COMPILED
@given(arguments=simple)
def test_heads_are_separate_and_groups_are_repeats(backend: str, arguments: AttentionCase) -> None:
    together = run(backend, arguments)
    groups = arguments.q.shape[1] // arguments.k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (arguments.k, arguments.v))
    repeated = run(backend, replace(arguments, k=k, v=v))
    for name in ("out", "lse", "d_q"):
        close(repeated[name], together[name])
    for name in ("d_k", "d_v"):
        close(repeated[name].unflatten(1, (-1, groups)).sum(2), together[name])
    assert arguments.grad_out is not None
    assert arguments.grad_lse is not None
    for h in range(arguments.shape[1]):
        one = slice(h, h + 1)
        alone = run(
            backend,
            replace(
                arguments,
                q=arguments.q[:, one],
                k=k[:, one],
                v=v[:, one],
                grad_out=arguments.grad_out[:, one],
                grad_lse=arguments.grad_lse[:, one],
            ),
        )
        for name in ("out", "lse", "d_q"):
            close(alone[name], together[name][:, one])


@pytest.mark.parametrize("queries", [3, 24])  # decoding, and tiles
def test_large_sinks_lose_no_digits(backend: str, queries: int) -> None:
    # softmax over n scores of 0 and a sink s: out = n / (e^s + n), d_sink = -sum of p (1 - p) * out
    sinks = torch.linspace(20.0, 60.0, 16, requires_grad=True)
    zeros, ones = torch.zeros(1, 16, queries, 8), torch.ones(1, 16, 5, 8)
    out = rk.attention(zeros, torch.zeros(1, 16, 5, 8), ones, sinks=sinks, backend=backend)
    out.sum().backward()
    assert sinks.grad is not None
    exact = 5 / (sinks.detach().double().exp() + 5)
    bound = 4 * torch.finfo(torch.float32).eps
    assert ((out[0, :, 0, 0].double() / exact - 1).abs() < bound).all()
    gradient = -queries * 8 * exact * (1 - exact)
    assert ((sinks.grad.double() / gradient - 1).abs() < bound).all()


@pytest.mark.parametrize(
    "mask",
    [None, rk.Window(70, 20, align="upper_left"), rk.KeyLengths(torch.tensor([290, 131]))],
    ids=["full", "window", "lengths"],
)
def test_float16_is_widened_exactly(backend: str, mask: rk.Mask | None) -> None:
    # blocks of keys are widened once for all tiles of a head; a window's first is met in its middle
    if backend not in ("native", "numba"):
        pytest.skip("computes float16 in a way of its own")
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, 333, 40, generator=generator).half()
    k, v = torch.randn(2, 2, 2, 300, 40, generator=generator).half().unbind()
    out = rk.attention(q, k, v, mask=mask, backend=backend)
    wide = rk.attention(q.float(), k.float(), v.float(), mask=mask, backend=backend)
    assert torch.equal(out, wide.half())


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_weights_of_equal_scores_lose_no_digits(backend: str, dropout_p: float) -> None:
    # every weight is 1 / n; score - lse, far from 0, must not cost the backward pass its digits
    eps = torch.finfo(torch.float32).eps
    for n in (3, 7, 100, 458, 777):
        q, k = torch.zeros(1, 1, 12, 8), torch.zeros(1, 1, n, 8)
        v = torch.ones(1, 1, n, 8, requires_grad=True)
        for bias in (0.0, 0.02, -0.3, 3e6, 1e8, -1e8, 1e12):  # lse * log2 e loses up to 2^17
            bound = (3 if abs(bias) < 1 else 12) * eps + 4 * abs(bias) * torch.finfo(
                torch.float64
            ).eps
            added = torch.full((1, 1, 1, 1), bias)
            out = rk.attention(q, k, v, bias=added, dropout_p=dropout_p, seed=n, backend=backend)
            (d_v,) = torch.autograd.grad(out, v, torch.ones_like(out))
            kept = (d_v * n * (1 - dropout_p)).round()
            assert (d_v.double() * n * (1 - dropout_p) - kept).abs().max() < bound * 12


@pytest.mark.parametrize("queries", [3, 24])
@pytest.mark.parametrize("sink", [1e20, 1e30, -1e30, -3e38, -math.inf])
def test_huge_sinks_and_rows_without_keys(backend: str, sink: float, queries: int) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(1, 1, queries, 8, generator=generator)
    k, v = torch.randn(2, 1, 1, 20, 8, generator=generator).unbind()
    allowed = torch.ones(1, 1, queries, 20, dtype=torch.bool)
    allowed[:, :, 1] = False
    sinks = torch.tensor([sink], requires_grad=True)
    out, lse = rk.attention(
        q, k, v, rk.Dense(allowed), sinks=sinks, return_lse=True, backend=backend
    )
    (d_sinks,) = torch.autograd.grad(out.sum(), sinks)
    expected = torch.zeros_like(out)
    if sink < 0:
        expected = rk.attention(q, k, v, rk.Dense(allowed), backend="reference")
    torch.testing.assert_close(out, expected)
    assert not lse.isnan().any()
    torch.testing.assert_close(d_sinks, torch.zeros(1))


@pytest.mark.parametrize("queries", [3, 24])
def test_sinks_without_end(backend: str, queries: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 2, queries, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 5, 8, generator=generator).unbind()
    out = rk.attention(q, k, v, sinks=torch.full((2,), -math.inf), backend=backend)
    torch.testing.assert_close(out, rk.attention(q, k, v, backend=backend))
