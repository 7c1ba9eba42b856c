"""Whether two results hold the same bits, and the same call on other numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...kernels.testing.oracle import Results


def same(one: Tensor, other: Tensor) -> Tensor:
    """bool, where both hold the same number, or both NaN."""
    return (one == other) | (one.isnan() & other.isnan())


def difference(got: Results, expected: Results) -> str | None:
    """Where two results do not hold the same bits, NaN for NaN."""
    for name, tensor in got.items():
        other = expected[name]
        equal = same(tensor, other)
        if not bool(equal.all()):
            apart = float((tensor.double() - other.double()).abs().nan_to_num(torch.inf).max())
            share = 100 * float((~equal).double().mean())
            return f"{name}: {share:.2g}% of the elements differ, by up to {apart:.2g}"
    return None


def on_all_threads(run: Callable[[], Results]) -> str | None:
    with on_threads(1):
        alone = run()
    for threads in (2, 3):
        with on_threads(threads):
            fault = difference(run(), alone)
        if fault is not None:
            return f"{threads} threads against one: {fault}"
    return None


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
