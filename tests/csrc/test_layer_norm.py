"""Layer norm of the backend "native", against float64 and, for rounding, against torch."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowmax.kernels import layer_norm
from rowmax.kernels.testing import RowCase, assert_as_accurate_as_naive

pytestmark = pytest.mark.usefixtures("extension")

EPS = 1e-5
SHAPES = [
    (1, 1),  # a deviation of zero
    (3, 7),  # less than one lane of 16
    (5, 16),
    (130, 33),  # blocks of unequal height in the backward, and a tail
    (65, 512),
]


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor


class Result(NamedTuple):
    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def make_case(shape: tuple[int, int], dtype: torch.dtype, offset: float = 0.0) -> Case:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return Case(draw(*shape) + offset, draw(shape[1]), draw(shape[1]), draw(*shape))


def run_native(case: Case) -> Result:
    x, weight, bias = (t.detach().requires_grad_() for t in case[:3])
    y = layer_norm(x, weight, bias, EPS, backend="native")
    return Result(y.detach(), *torch.autograd.grad(y, (x, weight, bias), case.dy))


def run_torch(case: Case, dtype: torch.dtype) -> Result:
    x, weight, bias = (t.to(dtype).requires_grad_() for t in case[:3])
    y = F.layer_norm(x, x.shape[1:], weight, bias, EPS)
    grads = torch.autograd.grad(y, (x, weight, bias), case.dy.to(dtype))
    return Result(y.detach(), *grads)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_float64(shape: tuple[int, int], offset: float, dtype: torch.dtype) -> None:
    x, weight, bias, dy = make_case(shape, dtype, offset)
    case = RowCase("layer_norm", {"x": x, "weight": weight, "bias": bias}, (dy,))
    assert_as_accurate_as_naive(partial(layer_norm, backend="native"), case)


def test_large_mean_is_more_exact_than_one_float_would_allow() -> None:
    """At mean 1e4, deviation 1, a float32 mean is off by up to 5e-4 deviations."""
    case = make_case((64, 512), torch.float32, offset=1e4)
    exact = run_torch(case, torch.float64)
    got = run_native(case)
    assert (got.y.double() - exact.y).abs().max() < 1e-5
    assert (got.dx.double() - exact.dx).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_and_bias_may_be_absent(dtype: torch.dtype) -> None:
    case = make_case((9, 20), dtype)
    neutral = {"weight": torch.ones(20, dtype=dtype), "bias": torch.zeros(20, dtype=dtype)}
    present = run_native(case._replace(**neutral))
    x = case.x.clone().requires_grad_()
    y = layer_norm(x, eps=EPS, backend="native")
    assert torch.equal(y.detach(), present.y)
    assert torch.equal(torch.autograd.grad(y, x, case.dy)[0], present.dx)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    result = run_native(make_case(shape, torch.float32))
    assert result.y.shape == result.dx.shape == shape
    assert torch.equal(result.dweight, torch.zeros(shape[1]))
    assert torch.equal(result.dbias, torch.zeros(shape[1]))


@pytest.mark.usefixtures("restored_threads")
def test_bitwise_the_same_for_any_number_of_threads() -> None:
    case = make_case((1000, 257), torch.float32)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run_native(case))
    for result in results[1:]:
        for name, first, other in zip(Result._fields, results[0], result, strict=True):
            assert torch.equal(first, other), name


def test_nan_stays_in_its_row() -> None:
    case = make_case((4, 40), torch.float32)
    clean = run_native(case)
    case.x[2, 5] = float("nan")
    y = run_native(case).y
    assert y[2].isnan().all()
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(y[keep], clean.y[keep])
