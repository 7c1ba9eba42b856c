"""The rule: what passes, what does not, and how errors are counted in ulps."""

from __future__ import annotations

import math

import pytest
import torch

from rowmax.kernels.testing.tolerance import (
    ULP_BINS,
    Accuracy,
    Expected,
    histogram,
    in_ulps,
    measure,
)


def normal(count: int = 256) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def measured(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-6) -> Accuracy:
    plain = (expected * (1 + relative)).float()
    return measure("out", got, Expected(expected, plain, expected.abs()), torch.float32)


def test_a_ratio_up_to_two_passes_and_is_reported() -> None:
    expected = normal()
    same = measured((expected * (1 - 1e-6)).float(), expected)
    assert same.fault is None
    assert same.ratio == pytest.approx(1.0, rel=0.1)
    worse = measured((expected * (1 - 1.9e-6)).float(), expected)
    assert worse.fault is None
    assert worse.ratio == pytest.approx(1.9, rel=0.1)
    assert worse.of_limit > same.of_limit


def test_three_times_the_error_fails() -> None:
    expected = normal()
    found = measured((expected * (1 + 3e-6)).float(), expected)
    assert found.fault is not None
    assert "largest error" in found.fault
    assert found.of_limit > 1


def test_many_small_errors_fail_by_their_mean() -> None:
    """Each as large as the naive path's worst, which is alone there."""
    expected = normal()
    plain = expected.float()
    plain[0] += 1e-4
    got = (expected + 1e-4).float()
    found = measure("out", got, Expected(expected, plain, expected.abs()), torch.float32)
    assert found.fault is not None
    assert "rms error" in found.fault


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_one_wrong_element_fails(value: float) -> None:
    expected = normal()
    got = expected.float()
    got[7] = value
    assert measured(got, expected).fault is not None


def test_where_the_oracle_is_not_finite_the_result_must_be_the_same() -> None:
    expected = normal()
    expected[3] = -math.inf
    plain = expected.float()
    good = measure("lse", plain, Expected(expected, plain, expected.abs()), torch.float32)
    assert good.fault is None
    lost = plain.clone()
    lost[3] = -1e9
    found = measure("lse", lost, Expected(expected, plain, expected.abs()), torch.float32)
    assert found.fault == "differs where the oracle is not finite"


def test_shapes() -> None:
    assert measured(normal(4).float(), normal(5)).fault == "shape (4,), expected (5,)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_neighbours_are_one_ulp_apart(dtype: torch.dtype) -> None:
    one = torch.tensor([1.0, 1.5, 8.0, -3.0], dtype=dtype)
    up = one * (1 + torch.finfo(dtype).eps)
    error = up.double() - one.double()
    assert in_ulps(error, one.double(), dtype).tolist() == pytest.approx([1, 1.5, 1, 1.5], abs=0.51)
    assert in_ulps(error, one.double(), dtype)[0] == 1.0


def test_the_histogram_counts_every_element_once() -> None:
    ulps = torch.tensor([0.0, 0.5, 0.6, 1.0, 3.0, 1e9], dtype=torch.float64)
    counts = histogram(ulps)
    assert sum(counts) == 6
    assert counts[:4] == (2, 2, 0, 1)
    assert counts[len(ULP_BINS) - 1] == 1


def test_squares_that_underflow_are_no_zero_error() -> None:
    expected = torch.full((4,), 1e-300, dtype=torch.float64)
    found = measure("out", expected * 2, Expected(expected, expected, expected), torch.float64)
    assert found.fault is not None
    assert found.relative_rms == pytest.approx(1.0)
