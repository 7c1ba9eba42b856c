"""The Triton kernels of norms and softmax, which work row by row, compiled without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rowmax.bench.tuning import ahead_of_time
from rowmax.kernels import Causal, KeyLengths, Mask
from rowmax.kernels.api.masks import structure_of
from rowmax.kernels.backends.gpu_triton import cross_entropy_launch as loss
from rowmax.kernels.backends.gpu_triton import softmax_launch as softmax
from rowmax.kernels.backends.gpu_triton.norm_launch import norms
from rowmax.kernels.ops.problem import (
    AddLayerNormProblem,
    AddNormInputs,
    RMSNormProblem,
    SoftmaxProblem,
)

ROWS = 64
SEED = torch.tensor(3)


def add_layer_norm(x: Tensor, weight: Tensor) -> None:
    problem = AddLayerNormProblem(x, x, weight, weight, 1e-5, 0.1, SEED)
    y, total, mean, rstd = norms.add_layer_norm(problem)
    norms.add_layer_norm_backward(problem, AddNormInputs(y, y, total, mean, rstd))


def rms_norm(x: Tensor, weight: Tensor) -> None:
    problem = RMSNormProblem(x, weight, 1e-5)
    y, rstd = norms.rms_norm(problem)
    norms.rms_norm_backward(problem, y, rstd)


def masked_softmax(x: Tensor, weight: Tensor) -> None:
    scores = x.view(2, 4, -1, x.shape[1])
    shape = (2, 4, scores.shape[2], scores.shape[3])
    mask: Mask = Causal("lower_right") & KeyLengths(torch.tensor([7, 5]))
    weights = softmax.masked_softmax(SoftmaxProblem(scores, structure_of(mask, shape, scores), 0.5))
    softmax.masked_softmax_backward(scores, weights, 0.5)


def cross_entropy(x: Tensor, weight: Tensor) -> None:
    loss.cross_entropy(x, torch.zeros(ROWS, dtype=torch.int64), 0.1, -100, True)


OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], None], set[str]]] = {
    "add_layer_norm": (
        add_layer_norm,
        {"norm_forward", "norm_backward", "norm_backward_sum_partials"},
    ),
    "rms_norm": (rms_norm, {"norm_forward", "norm_backward", "norm_backward_sum_partials"}),
    "masked_softmax": (masked_softmax, {"softmax_forward", "softmax_backward"}),
    "linear_cross_entropy": (cross_entropy, {"cross_entropy_rows"}),
}
# The cases that spill: the compiler is a register short, or the logarithm in float64 takes them.
FEW_BYTES = {("rms_norm", 64, torch.float64, "sm_100"): 4} | {
    ("linear_cross_entropy", columns, torch.float64, arch): spilled
    for columns in (8192, 100_000)
    for arch, spilled in (("sm_80", 12), ("sm_100", 4))
}
LONG = {
    "norm_forward_blocked",
    "norm_backward_row_means",
    "norm_backward",
    "norm_backward_sum_partials",
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("columns", [64, 1024, 8192, 100_000])
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_spills(name: str, columns: int, dtype: torch.dtype, arch: str) -> None:
    """Narrow rows, whole rows, the longest that a program holds, and rows in blocks."""
    ahead_of_time.pretend(arch)
    function, kernels = OPERATIONS[name]
    if columns == 100_000 and "norm_backward" in kernels:
        kernels = LONG
    with ahead_of_time.compiled_launches() as launched:
        function(torch.empty(ROWS, columns, dtype=dtype), torch.empty(columns, dtype=dtype))
    assert set(launched) >= kernels
    for compiled in launched.values():
        assert replace(compiled, spilled=0).fits(arch), launched
        assert compiled.spilled <= FEW_BYTES.get((name, columns, dtype, arch), 0), launched
