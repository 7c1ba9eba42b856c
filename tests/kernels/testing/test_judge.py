"""`assert_as_accurate_as_naive`: right kernels pass, and wrong ones don't."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowmax import kernels
from rowmax.kernels import Causal, KeyLengths
from rowmax.kernels.testing import (
    DTYPES,
    OPS,
    AttentionCase,
    RowCase,
    assert_as_accurate_as_naive,
    named_cases,
    packed_case,
)
from rowmax.kernels.testing.cases import Draw
from rowmax.kernels.testing.rows import norm_case
from rowmax.kernels.testing.suite import ATTENTION_OPS
from rowmax.kernels.testing.tolerance import Expected, measure

from ... import tensors

rand = functools.partial(tensors.rand, dtype=torch.float32)


def attention_case(dtype: torch.dtype = torch.float32, **more: Any) -> AttentionCase:
    q, k, v = rand(2, 4, 9, 8, dtype=dtype), rand(2, 2, 9, 8, dtype=dtype), rand(2, 2, 9, 7)
    return AttentionCase(q, k, v.to(dtype), grad_out=rand(2, 4, 9, 7).to(dtype), **more)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Causal | None = None) -> Tensor:
    """Somebody's attention: a plain function of tensors."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        allowed = mask.dense(*scores.shape)
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, Causal()], ids=["none", "causal"])
def test_a_plain_function_passes(mask: Causal | None, dtype: torch.dtype) -> None:
    """Its out alone; without gradients too."""
    case = attention_case(dtype, mask=mask)
    assert_as_accurate_as_naive(lambda *t, **o: eager(*t, **o).to(dtype), case)
    with torch.no_grad():
        out = eager(*case.tensors, **case.keywords).to(dtype)
    assert_as_accurate_as_naive(lambda *t, **o: out, replace(case, grad_out=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_functions_of_rowmax_pass_the_named_cases(op: str, dtype: torch.dtype) -> None:
    more = {"return_lse": True} if op in ATTENTION_OPS else {}
    kernel = partial(getattr(kernels, op), backend="reference", **more)
    kinds = ["none", "causal", "weight", "dropout", "one-outlier"]
    cases = named_cases(op, dtype, kinds, quick=True)
    assert len(cases) >= 2
    for case in cases:
        assert_as_accurate_as_naive(kernel, case, device="cpu")


def test_norms_of_torch_pass() -> None:
    x, weight, bias = rand(33, 40), rand(40), rand(40)
    case = RowCase("layer_norm", {"x": x, "weight": weight, "bias": bias}, (rand(33, 40),))
    assert_as_accurate_as_naive(lambda x, **options: F.layer_norm(x, x.shape[-1:], **options), case)
    with pytest.raises(AssertionError, match="d_bias: largest error"):
        assert_as_accurate_as_naive(
            lambda x, bias, **options: (
                F.layer_norm(x, x.shape[-1:], bias=bias * 1.0, **options)
                + 1e-3 * (bias - bias.detach())
            ),
            case,
        )


def test_a_norm_whose_dropout_keeps_nothing() -> None:
    draw = Draw(3, torch.float32)
    options = {"dropout_p": 1.0, "seed": 5}
    case = norm_case("add_layer_norm", draw.normal(4, 9), draw, ("weight",), options)
    assert_as_accurate_as_naive(kernels.add_layer_norm, case)


def test_packed_sequences_of_ones_own() -> None:
    lengths = torch.tensor([9, 4]), torch.tensor([3, 9])
    case = attention_case(grad_lse=rand(2, 4, 9))
    packed = packed_case(case, *lengths)
    kernel = partial(kernels.attention_varlen, backend="reference")
    assert_as_accurate_as_naive(partial(kernel, return_lse=True), packed)
    assert_as_accurate_as_naive(kernel, packed)  # out alone
    with pytest.raises(AssertionError, match="out: largest error"):
        assert_as_accurate_as_naive(lambda *t, **o: 1.001 * kernel(*t, **o), packed)


def last_row_doubled(out: Tensor) -> Tensor:
    return torch.cat((out[:, :, :-1], 2 * out[:, :, -1:]), 2)


def nan_in_one_place(out: Tensor) -> Tensor:
    return out.masked_fill(torch.arange(out.shape[-1]) == out.shape[-1] - 1, torch.nan)


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one row": (last_row_doubled, "out: largest error"),
    "one thousandth": (lambda out: out * 1.001, "out: largest error"),
    "its gradient": (lambda out: out.detach() + 1.001 * (out - out.detach()), "d_q: largest error"),
    "NaN": (nan_in_one_place, "out: NaN or infinity where the oracle is finite"),
    "infinity": (lambda out: out / 0.0, "out: NaN or infinity where the oracle is finite"),
    "shape": (lambda out: out[..., :-1], r"out: shape \(2, 4, 9, 6\), expected \(2, 4, 9, 7\)"),
    "too many heads": (lambda out: out.repeat(1, 2, 1, 1), r"out: shape \(2, 8, 9, 7\)"),
    "wider": (lambda out: out.double(), "out: torch.float64, expected torch.float32"),
    "narrower": (lambda out: out.bfloat16(), "out: torch.bfloat16, expected torch.float32"),
    "lse": (lambda out: (out, out.sum(-1)), "lse: largest error"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_rejected(name: str) -> None:
    change, words = WRONG[name]
    with pytest.raises(AssertionError, match=words):
        assert_as_accurate_as_naive(lambda *t, **o: change(eager(*t, **o)), attention_case())


def test_every_fault_is_named_and_the_case() -> None:
    case = named_cases("add_layer_norm", torch.float32, ["weight"])[0]
    with pytest.raises(AssertionError) as failure:
        assert_as_accurate_as_naive(lambda x, residual, **options: 0 * (x + residual), case)
    text = str(failure.value)
    assert text.startswith("add_layer_norm weight (7,5) float32: out: largest error")
    for fault in ("d_x: ", "sum: is missing", "d_weight: is missing"):
        assert fault in text


def test_a_lucky_naive_path_demands_no_exactness() -> None:
    """With one key each, out is its value: the naive path makes no error at all."""
    v = rand(3, 2, 1, 6)
    case = AttentionCase(rand(3, 2, 5, 4), rand(3, 2, 1, 4), v, grad_out=rand(3, 2, 5, 6))
    exact, naive, _ = case.expected["out"]
    assert torch.equal(naive.double(), exact)

    def off_by(ulps: float) -> Callable[..., Tensor]:
        factor = 1 + ulps * torch.finfo(torch.float32).eps
        return lambda *t, **o: eager(*t, **o) * factor

    assert_as_accurate_as_naive(off_by(1), case)
    with pytest.raises(AssertionError, match="out: largest error"):
        assert_as_accurate_as_naive(off_by(64), case)


def test_a_naive_path_without_a_number_allows_nothing() -> None:
    """Where the naive path overflows, the tolerance is the rounding, not everything."""
    exact = rand(8).double()
    naive = exact.float()
    naive[3] = torch.inf
    expected = Expected(exact, naive, exact.abs())
    assert measure("out", exact.float(), expected, torch.float32).fault is None
    assert measure("out", exact.float() + 1e-3, expected, torch.float32).fault is not None


def test_rows_that_attend_nothing_are_compared() -> None:
    """lse = -inf there, and a finite one is a fault."""
    case = attention_case(mask=KeyLengths(torch.tensor([0, 9])))
    right = partial(kernels.attention, return_lse=True, backend="reference")
    assert_as_accurate_as_naive(right, case)

    def finite(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = right(*tensors, **options)
        return out, lse.clamp_min(-1e9)

    with pytest.raises(AssertionError, match="lse: differs where the oracle is not finite"):
        assert_as_accurate_as_naive(finite, case)


@pytest.mark.parametrize(
    "kernel, case, words",
    [
        (3, attention_case(), "`kernel`: expected a callable, got int"),
        (eager, "causal", "`case`: expected one of NamedCase, .* got str"),
        (lambda *t, **o: None, attention_case(), "expected to return .* got nothing"),
        (lambda *t, **o: (t[0], 3), attention_case(), "got Tensor, int"),
        (lambda *t, **o: (*t,), attention_case(), "expected out, or out and lse, got 3 tensors"),
    ],
)
def test_wrong_arguments(kernel: Any, case: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        assert_as_accurate_as_naive(kernel, case)


def test_wrong_names_of_cases() -> None:
    for arguments, words in (
        (("atention", torch.float32), "`ops`: expected of .* got 'atention'"),
        (("attention", torch.int8), "`dtype`: expected one of .* got torch.int8"),
        (("attention", torch.float32, ["odd"]), "`kinds`: expected of .* got 'odd'"),
    ):
        with pytest.raises(ValueError, match=words):
            named_cases(*arguments)


class _OneInFifty(torch.autograd.Function):
    """The tensor itself, with a gradient that is two percent too large."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:  # noqa: ARG004
        return bias.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return 1.02 * gradient


def test_a_gradient_wider_than_the_stored_out() -> None:
    """Of a float32 bias beside bfloat16: its error is one draw of the rounding of out, for the
    naive path too, which may be lucky."""
    for seed in range(320, 360):
        generator = torch.Generator().manual_seed(seed)
        q, k, v, grad_out = (
            torch.randn(1, 1, length, 64, generator=generator).bfloat16()
            for length in (12, 13, 13, 12)
        )
        bias = 2 * torch.randn(1, 1, 12, 13, generator=generator)
        case = AttentionCase(q, k, v, bias=bias, grad_out=grad_out)
        assert_as_accurate_as_naive(kernels.attention, case)

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return kernels.attention(q, k, v, bias=_OneInFifty.apply(bias))

    with pytest.raises(AssertionError, match="d_bias"):
        assert_as_accurate_as_naive(biased, case)
