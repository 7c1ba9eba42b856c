"""Every attention case on every backend in every dtype against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from .backends import device_of, dtype_name, refused
from .cases import CASES, Case
from .support import DTYPES, assert_parity, run


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case: Case, dtype: torch.dtype, backend: str) -> None:
    arguments = case.build(dtype, device_of(backend))
    if not refused(backend, case.features(dtype), lambda: run(backend, arguments)):
        assert_parity(run(backend, arguments), arguments)
