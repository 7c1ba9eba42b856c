"""bfloat16 by dot products (`gemm_bfloat16`), and by float32 where the host has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rowmax.kernels import ALiBi, Causal, KeyLengths, QueryLengths, attention
from rowmax.kernels.backends import dispatch

from .cases import Case, Shape, always, lengths, random_bias, random_dense
from .support import assert_parity, run

if dispatch.unavailable("numba"):
    pytest.skip(str(dispatch.unavailable("numba")), allow_module_level=True)

from rowmax.kernels.backends.cpu_numba import attention_launch, host
from rowmax.kernels.testing.tolerance import SUMMATION

needs_dots = pytest.mark.skipif(
    not host.bfloat16_dots(), reason="no bfloat16 dot-product instructions here"
)
# The native backend decides once a process: `tests/csrc/test_backend.py` runs it without them.
BACKENDS = [name for name in ("numba", "native") if dispatch.unavailable(name) is None]
either = pytest.mark.parametrize("backend", BACKENDS)

CASES = [
    Case("dots_long", Shape(1, 2, 2, 150, 300, 64, 64), always(Causal("lower_right"))),
    Case("dots_odd", Shape(1, 4, 2, 37, 141, 33, 37)),
    Case(
        "dots_terms",
        Shape(2, 2, 2, 70, 131, 24, 80),
        random_dense(True, False, True, True),
        random_bias(False, True, True, True),
        sinks=True,
        options={"softcap": 3.0, "dropout_p": 0.3, "seed": 5},
    ),
    # In the lane past the last query, which completes a pair, weights grow beyond all bounds.
    Case(
        "dots_steep",
        Shape(1, 1, 1, 5, 400, 16, 16),
        bias=lambda shape, draw: ALiBi(torch.tensor([-1.0]), align="upper_left"),
    ),
    Case("dots_lengths", Shape(3, 2, 2, 20, 90, 16, 16), always(KeyLengths(lengths(0, 33, 90)))),
]


def without_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launch, "bfloat16_dots", lambda: False)
    monkeypatch.setattr(attention_launch, "_plans", {})  # of calls that were made with them


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "backend,dots",
    [*(pytest.param(name, True, marks=needs_dots) for name in BACKENDS), ("numba", False)],
)
def test_both_ways_agree_with_the_oracle(
    case: Case, backend: str, dots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dots:
        without_dots(monkeypatch)
    arguments = case.build(torch.bfloat16)
    assert_parity(run(backend, arguments), arguments)


@needs_dots
def test_the_instruction_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes subnormal values for zeros; float32 keeps them."""
    q, k = (torch.randn(1, 1, 40, 16).bfloat16() for _ in range(2))
    v = torch.full((1, 1, 40, 16), 2.0**-130, dtype=torch.bfloat16)
    for backend in BACKENDS:
        assert attention(q, k, v, backend=backend).eq(0.0).all()
    without_dots(monkeypatch)
    assert attention(q, k, v, backend="numba").eq(v).all()


@needs_dots
def test_the_backward_uses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key has all the weight: d_value is the sum of grad_out, in subnormal numbers."""

    def d_value(backend: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, 1, length, 16, generator=generator).bfloat16() for length in (4, 1, 1)
        )
        v.requires_grad_()
        grad_out = torch.full((1, 1, 4, 16), 2.0**-130, dtype=torch.bfloat16)
        return torch.autograd.grad(attention(q, k, v, backend=backend), v, grad_out)[0]

    for backend in BACKENDS:
        assert d_value(backend).eq(0.0).all()
    without_dots(monkeypatch)
    assert d_value("numba").eq(2.0**-128).all()


@pytest.mark.parametrize("dim", [1, 2, 15, 31, 32, 33, 64, 70])
@pytest.mark.parametrize("rows", [17, 40, 64, 65])
@either
def test_products_of_integers_are_exact(backend: str, dim: int, rows: int) -> None:
    """With one key, the last of an odd number, lse is its score, out its value, its weight 1."""
    generator = torch.Generator().manual_seed(dim)

    def integers(length: int) -> Tensor:
        return torch.randint(-9, 10, (1, 2, length, dim), generator=generator).bfloat16()

    q, k, v = integers(rows), integers(1), integers(1)
    out, lse = attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    assert torch.equal(out, v.expand_as(out))
    v.requires_grad_()
    grad_out = integers(rows)
    (d_value,) = torch.autograd.grad(attention(q, k, v, backend=backend), v, grad_out)
    grad_out = grad_out.double()
    expected = grad_out.sum(2, keepdim=True)
    q, k = q.double(), k.double()
    score, size = ((a @ b.mT)[..., 0] for a, b in ((q, k), (q.abs(), k.abs())))
    # (float32 rounds q * log2(e), one by one, and lse at its end)
    rounding = SUMMATION * torch.finfo(torch.float32).eps * size
    assert ((lse - score).abs() <= rounding).all()
    # The backward pass has the weights anew, exp(score - lse). Dot products round them to bfloat16.
    if host.bfloat16_dots():
        assert torch.equal(d_value, expected.bfloat16())
    of_weights = dim**-0.5 * (rounding.unsqueeze(-1) * grad_out.abs()).sum(2, keepdim=True)
    own = torch.finfo(torch.bfloat16).eps / 2 * expected.abs()
    assert ((d_value.double() - expected).abs() <= own + of_weights).all()


@pytest.mark.parametrize("shape", [(70, 33, 7), (66, 77, 40), (18, 129, 64)])
@either
def test_nothing_around_the_tensors_is_used(backend: str, shape: tuple[int, int, int]) -> None:
    """Odd row strides, NaN before and behind every row: the bits are those of packed tensors."""
    queries, keys, dim = shape
    generator = torch.Generator().manual_seed(queries)

    def amid_nan(length: int) -> Tensor:
        around = torch.full((1, 2, length + 2, dim + dim % 2 + 3), torch.nan, dtype=torch.bfloat16)
        inside = around[:, :, 1:-1, 1 : dim + 1]
        inside.copy_(torch.randn(1, 2, length, dim, generator=generator))
        assert inside.stride(2) % 2 == 1
        return inside

    q, k, v = amid_nan(queries), amid_nan(keys), amid_nan(keys)
    grad_out = amid_nan(queries)

    def results(tensors: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attention(leaves[0], leaves[1], leaves[2], backend=backend)
        return out, *torch.autograd.grad(out, leaves, grad_out)

    expected = results([q.contiguous(), k.contiguous(), v.contiguous()], grad_out.contiguous())
    for got, wanted in zip(results([q, k, v], grad_out), expected, strict=True):
        assert torch.equal(got, wanted)
        assert wanted.isfinite().all()


@pytest.mark.parametrize("queries", [5, 64, 77])
@either
def test_rows_that_attend_nothing_give_nothing(backend: str, queries: int) -> None:
    """Whatever they hold: their weights are 0, and 0 * NaN must not come about."""
    generator = torch.Generator().manual_seed(queries)
    tensors = [
        torch.randn(2, 2, length, 24, generator=generator).bfloat16()
        for length in (queries, 50, 50)
    ]
    grad_out = torch.randn(2, 2, queries, 24, generator=generator).bfloat16()
    live = [1, queries - 2]

    def gradients(bad: float) -> tuple[Tensor, ...]:
        q, k, v = (tensor.clone() for tensor in tensors)
        g = grad_out.clone()
        for element, length in enumerate(live):
            q[element, :, length:] = bad
            g[element, :, length:] = bad
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = attention(
            *(leaves[0], leaves[1], leaves[2]),
            mask=QueryLengths(torch.tensor(live)),
            backend=backend,
        )
        return torch.autograd.grad(out, leaves, g)

    for got, wanted in zip(gradients(torch.nan), gradients(0.0), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("last", [1.0, torch.inf])
@either
def test_an_odd_number_of_keys(backend: str, last: float) -> None:
    """The last pair is completed with zeros: neither with the last value nor with what an earlier
    call left in the scratch."""
    q, k, v = (torch.zeros(1, 1, length, 16, dtype=torch.bfloat16) for length in (40, 65, 65))
    v[:] = 1.0
    v[:, :, -1] = last
    more = torch.zeros(1, 1, 128, 16, dtype=torch.bfloat16)
    attention(torch.full_like(q, torch.nan), more, more, backend=backend)
    assert attention(q, k, v, backend=backend).eq(last).all()


def test_the_host_or_the_environment_may_forbid_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = host.bfloat16_dots.__wrapped__  # not what was found before
    monkeypatch.setenv(host.DOTS_VARIABLE, "0")
    assert not ask()
    monkeypatch.setenv(host.DOTS_VARIABLE, "no")
    with pytest.raises(ValueError, match=r"ROWMAX_BFLOAT16_DOTS: expected 0 or 1, got 'no'"):
        ask()
    monkeypatch.delenv(host.DOTS_VARIABLE)
    monkeypatch.setattr(host, "vector_bits", lambda: 256)
    assert not ask()
