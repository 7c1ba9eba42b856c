"""Running attention on a backend, and holding what it gives to the judge of rowmax.kernels.testing.

`test_oracle.py` holds the oracle to a few lines of pure Python.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rowmax.kernels import attention
from rowmax.kernels.backends.reference.philox import NORM_STREAM, keep_threshold, philox4x32
from rowmax.kernels.testing.cases import DTYPES
from rowmax.kernels.testing.oracle import AttentionCase, Results, TestCase, random_gradients
from rowmax.kernels.testing.tolerance import faults_of

__all__ = [
    "DTYPES",
    "AttentionCase",
    "Results",
    "assert_parity",
    "random_gradients",
    "row_keeps",
    "run",
    "traced",
]


def run(backend: str, case: AttentionCase) -> Results:
    """out, lse and, where the case holds gradients of the outputs, d_q, d_k, d_v, ..."""
    return case.run(partial(attention, return_lse=True, backend=backend))


def assert_parity(results: Results, case: TestCase) -> None:
    """Every result is within the tolerance."""
    faults = faults_of(results, case.expected, case.sum_dtype)
    assert not faults, "; ".join(faults)


def row_keeps(row: int, columns: int, p: float, seed: int) -> Tensor:
    """bool (columns,): what dropout keeps of a norm's row, whatever its number."""
    low, high, stream = map(torch.tensor, (row % 2**32, row // 2**32, NORM_STREAM))
    words = philox4x32((torch.arange(columns // 4), low, high, stream), torch.tensor(seed))
    return torch.stack(torch.broadcast_tensors(*words), -1).flatten() >= keep_threshold(p)


def traced(function: Callable[..., Any], *arguments: Tensor) -> Callable[..., Any]:
    """The trace as it comes out of a file; its only warning is that tracing is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is deprecated")
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        graph = torch.jit.trace(function, arguments)
        file = io.BytesIO()
        torch.jit.save(graph, file)
        file.seek(0)
        return torch.jit.load(file)
