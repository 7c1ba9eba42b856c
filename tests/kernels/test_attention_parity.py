"""Every attention case on every backend in every dtype against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from .backends import BACKENDS, device_of, dtype_name, is_interpreted
from .cases import CASES, Case, Shape
from .support import DTYPES, assert_parity, run


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: Case, dtype: torch.dtype, backend: str) -> None:
    arguments = case.build(dtype, device_of(backend))
    assert_parity(run(backend, arguments), arguments)


@pytest.mark.parametrize("name", [name for name in BACKENDS if not is_interpreted(name)])
def test_errors_do_not_grow_with_the_length(name: str) -> None:
    """Over 2048 keys: one accumulator for all of them, or a rounded lse, errs twice the naive."""
    device = device_of(name)
    case = Case("rounding", Shape(1, 1, 1, 2048, 2048, 64, 64))
    arguments = case.build(torch.float32, device)
    got, plain, exact = run(name, arguments), arguments.naive(), arguments.oracle()
    for key in ("out", "d_q", "d_k", "d_v"):
        error, plain_error = (
            (tensor[key].double() - exact[key]).square().mean().sqrt() for tensor in (got, plain)
        )
        assert error <= 1.5 * plain_error, key
