"""The rule by which a result passes: measured against the naive path on the very same inputs.

For the largest error and for the root mean square of all errors alike,

    error <= 2 * error(naive path in the same dtype)
             + eps(result's dtype) * |oracle| + SUMMATION * eps(float32 or 64) * magnitude

where `magnitude` is what the sums would be if no term cancelled another: a lucky naive path, exact
on a tiny case, would otherwise demand exactness. Where the oracle is not finite (lse = -inf), the
result must be the same; NaN never passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0  # times the naive path's error
SUMMATION = 2.0  # roundings of a long sum, in units of eps times the terms' magnitudes
# The chances of a model beyond the first, each with `perturbed` weights; and by how much they move.
CHANCES = 3
_MOVED_BY = 16.0  # roundings

# Upper ends of the histogram's bins, in units in the last place; the last bin has none.
ULP_BINS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0, math.inf)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _rms(values: Tensor) -> float:
    """Of values whose squares may lie beyond the largest or below the smallest number."""
    largest = _largest(values)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float((values / largest).square().mean().sqrt())


_NORMS: tuple[tuple[str, Callable[[Tensor], float]], ...] = (("largest", _largest), ("rms", _rms))


class Expected(NamedTuple):
    """The reference values of one result, all of one shape."""

    exact: Tensor  # the oracle's, float64
    naive: Tensor  # the naive path's, in the dtype that the result must have
    magnitude: Tensor  # its sum with every term replaced by its magnitude, float64


@dataclass(frozen=True)
class Accuracy:
    """How far one tensor is from the oracle, and whether that is within the tolerance."""

    tensor: str
    fault: str | None  # None: it passes
    largest: float = 0.0  # largest absolute error
    relative_rms: float = 0.0  # rms error / rms of the oracle's elements
    naive_largest: float = 0.0  # the naive path's, on the same inputs
    naive_relative_rms: float = 0.0
    ulps: float = 0.0  # largest error in units in the last place
    histogram: tuple[int, ...] = (0,) * len(ULP_BINS)  # elements by error in ulps, see ULP_BINS
    ratio: float = 0.0
    of_limit: float = 0.0  # error / what is allowed: at most 1 passes
    limit: float = 0.0  # largest error that is allowed

    def as_json(self) -> dict[str, Any]:
        return {
            "tensor": self.tensor,
            "fault": self.fault,
            "largest_error": _number(self.largest),
            "relative_rms_error": _number(self.relative_rms),
            "naive_largest_error": _number(self.naive_largest),
            "naive_relative_rms_error": _number(self.naive_relative_rms),
            "largest_ulps": _number(self.ulps),
            "ratio": _number(self.ratio),
            "of_limit": _number(self.of_limit),
        }


def accuracies(
    results: dict[str, Tensor],
    expected: dict[str, Expected],
    sum_dtype: torch.dtype,
    factor: float | None = None,
) -> tuple[Accuracy, ...]:
    """Each result measured; what is missing, or no result of the function, has a fault."""
    missing = [Accuracy(name, "is missing") for name in expected if name not in results]
    found = [
        measure(name, actual, expected[name], sum_dtype, factor)
        if name in expected
        else Accuracy(name, "is no result of this function")
        for name, actual in results.items()
    ]
    return (*found, *missing)


def faults_of(
    results: dict[str, Tensor], expected: dict[str, Expected], sum_dtype: torch.dtype
) -> list[str]:
    """One line for each result that is outside the tolerance."""
    missing = [f"{name}: is missing" for name in expected if name not in results]
    found = {
        name: _compared(actual, expected[name], sum_dtype, FACTOR).fault
        if name in expected
        else "is no result of this function"
        for name, actual in results.items()
    }
    return [f"{name}: {fault}" for name, fault in found.items() if fault is not None] + missing


def measure(
    name: str,
    actual: Tensor,
    expected: Expected,
    sum_dtype: torch.dtype,
    factor: float | None = None,
) -> Accuracy:
    """The rule for one tensor, whose sums are in `sum_dtype`; `factor` stands in for FACTOR.

    The printed `ratio` is error / naive error, the worse of both norms. A naive error that is
    luckily below an eighth of the rounding allowed counts as that eighth; in float64, where the
    oracle is no wider than what it judges, half the rounding allowed stands in for it.
    """
    found = _compared(actual, expected, sum_dtype, FACTOR if factor is None else factor)
    if found.error is None or found.exact is None:
        return Accuracy(name, found.fault)
    ratio, of_limit = 0.0, 0.0
    for size, naive_size, allowance, limit in found.norms:
        floor = allowance / (2 if actual.dtype == torch.float64 else 8)
        ratio = max(ratio, size / max(naive_size, floor))
        of_limit = max(of_limit, size / limit)
    ulps = in_ulps(found.error, found.exact, actual.dtype)
    scale = max(_rms(found.exact), torch.finfo(actual.dtype).tiny)
    (largest, naive_largest, _, limit), (rms, naive_rms, _, _) = found.norms
    return Accuracy(
        name,
        found.fault,
        largest,
        rms / scale,
        naive_largest,
        naive_rms / scale,
        float(ulps.max()),
        histogram(ulps),
        ratio,
        of_limit,
        limit,
    )


class _Compared(NamedTuple):
    """One tensor beside what it is held to, where that is finite."""

    fault: str | None
    error: Tensor | None = None
    exact: Tensor | None = None
    # of each norm: the error's, the naive error's, that of the rounding allowed, and the limit
    norms: tuple[tuple[float, float, float, float], ...] = ()


def _compared(
    actual: Tensor, expected: Expected, sum_dtype: torch.dtype, factor: float
) -> _Compared:
    exact, naive, magnitude = expected
    if actual.shape != exact.shape:
        return _Compared(f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if actual.dtype != naive.dtype:
        return _Compared(f"{actual.dtype}, expected {naive.dtype}")
    wide, naive = actual.to(torch.float64), naive.to(torch.float64)
    finite = torch.isfinite(exact)
    if not finite.all():
        if not torch.equal(wide[~finite], exact[~finite]):
            return _Compared("differs where the oracle is not finite")
        exact, wide, naive, magnitude = (of[finite] for of in (exact, wide, naive, magnitude))
    if not torch.isfinite(wide).all():
        return _Compared("NaN or infinity where the oracle is finite")
    if exact.numel() == 0:
        return _Compared(None)
    error, naive_error = wide - exact, naive - exact
    # where the naive path itself overflows or gives NaN, that allows nothing
    naive_error = naive_error.where(naive_error.isfinite(), 0.0)
    stored = torch.finfo(actual.dtype)
    # `tiny` covers underflow
    rounding = stored.eps * exact.abs() + stored.tiny
    rounding = rounding + SUMMATION * torch.finfo(sum_dtype).eps * magnitude
    fault, norms = None, []
    for norm, norm_of in _NORMS:
        size, naive_size, allowance = norm_of(error), norm_of(naive_error), norm_of(rounding)
        limit = factor * naive_size + allowance
        norms.append((size, naive_size, allowance, limit))
        if not size <= limit and fault is None:
            fault = (
                f"{norm} error {size:.3e} > {limit:.3e}, the naive path's is {naive_size:.3e}, "
                f"of values up to {_largest(exact):.3e}"
            )
    return _Compared(fault, error, exact, tuple(norms))


def expected_of_model(exact: Tensor, naive: Tensor, largest: float | None = None) -> Expected:
    """The `Expected` of a result of a whole model, the terms of whose sums are not known.

    Each term counts as `largest`, by default the largest value of `exact`. In float64, where the
    naive path's error is not known, a chain of layers is allowed sixteen roundings of that.
    """
    finite = exact[exact.isfinite()]
    if largest is None:
        largest = _largest(finite) if finite.numel() else 0.0
    times = (16.0 - 1.0) / SUMMATION if naive.dtype == torch.float64 else 1.0
    return Expected(exact, naive, torch.full_like(exact, times * largest))


def perturbed(weight: Tensor, generator: torch.Generator) -> Tensor:
    """`weight` with each element moved by a few roundings, either way.

    Where the input of a ReLU is within a rounding of 0, both sides are right, and gradients jump: a
    model may be on the other side than float64. With moved weights it is there by chance only,
    while what is wrong stays wrong.
    """
    weight = weight.detach()
    chance = torch.rand(weight.shape, generator=generator).to(weight.device) - 0.5
    return (weight * (1.0 + _MOVED_BY * torch.finfo(weight.dtype).eps * chance)).to(weight.dtype)


def in_ulps(error: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """|error| in units in the last place that a number of `dtype` has at `exact`; all float64."""
    stored = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp_min(stored.tiny))
    unit = torch.ldexp(torch.full_like(exact, stored.eps), exponent - 1)
    return error.abs() / unit


def histogram(ulps: Tensor) -> tuple[int, ...]:
    """The number of elements in each of ULP_BINS, lower ends excluded."""
    edges = torch.tensor(ULP_BINS[:-1], dtype=torch.float64, device=ulps.device)
    counts = torch.bincount(torch.bucketize(ulps.flatten(), edges), minlength=len(ULP_BINS))
    return tuple(counts.tolist())


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
