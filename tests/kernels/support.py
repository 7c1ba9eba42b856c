"""Running attention on a backend, and holding what it gives to the judge of rowmax.kernels.testing.

`test_oracle.py` holds the oracle to a few lines of pure Python.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
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
    "loss_gradients",
    "random_gradients",
    "row_keeps",
    "run",
    "traced",
]


def run(backend: str, case: AttentionCase) -> Results:
    """out, lse and, where the case holds gradients of the outputs, d_q, d_k, d_v, ..."""
    return case.run(partial(attention, return_lse=True, backend=backend))


def loss_gradients(call: Callable[..., Any], arguments: Iterable[Any]) -> tuple[Tensor | None, ...]:
    """The outputs, and the gradients of their squares' sum, in which an lse of -inf is no term."""
    leaves = [
        argument.detach().clone().requires_grad_(argument.is_floating_point())
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    ]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    finite = [output.masked_fill(output == -torch.inf, 0.0) for output in outputs]
    loss = torch.stack([output.square().sum() for output in finite]).sum()
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return (*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True))


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
