"""Learnable biases: tables that are indexed, and how a gradient is summed over what shares one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rowmax.kernels import Causal, Dense, attention
from rowmax.kernels.testing.oracle import expected_of
from rowmax.kernels.testing.tolerance import faults_of

from .backends import device_of
from .support import AttentionCase, assert_parity, random_gradients, run

LENGTH, HEADS, BATCH = 45, 3, 2


def relative_positions() -> Tensor:
    """(L, L) of j - i + L - 1: the row of the table for each pair (Shaw et al. 2018; T5)."""
    i = torch.arange(LENGTH)
    return i - i.view(-1, 1) + LENGTH - 1


def gradient_of_table(backend: str, dtype: torch.dtype, per_batch: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    device = device_of(backend)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, v, grad = (draw(BATCH, HEADS, LENGTH, 16) for _ in range(4))
    table = draw(2 * LENGTH - 1, HEADS).requires_grad_()
    bias = table[relative_positions().to(device)].permute(2, 0, 1)
    if per_batch:  # one table for both, read through an expanded batch dimension
        bias = bias.expand(BATCH, HEADS, LENGTH, LENGTH)
    out = attention(q, k, v, Causal(), bias, backend=backend)
    (found,) = torch.autograd.grad(out, table, grad)
    return found


@pytest.mark.parametrize("per_batch", [False, True], ids=["shared", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_relative_position_table(dtype: torch.dtype, per_batch: bool, backend: str) -> None:
    exact = gradient_of_table("reference", torch.float64, per_batch).cpu()
    plain = gradient_of_table("reference", dtype, per_batch).cpu()
    got = gradient_of_table(backend, dtype, per_batch).cpu()
    # a distance d collects the pairs (i, i - d) of both batch elements
    terms = (LENGTH - torch.arange(2 * LENGTH - 1).sub(LENGTH - 1).abs()).view(-1, 1) * BATCH
    magnitude = terms * exact.abs().max()
    assert exact.abs().max() > 1.0  # the table matters
    assert (exact[LENGTH:] == 0).all()  # keys after the query
    found = [{"d_table": tensor} for tensor in (exact, plain, magnitude / LENGTH)]
    expected = expected_of(found[0], found[1], found[2], terms=LENGTH * BATCH)
    assert faults_of({"d_table": got}, expected, dtype) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dense", [False, True], ids=["", "dense"])
@pytest.mark.parametrize(
    "batch,shape",
    [(2, (2, 2, 37, 77)), (2, (1, 2, 37, 77)), (20, (1, 2, 37, 77)), (20, (1, 1, 37, 77))],
    ids=["own", "shared by 2", "shared by 20", "shared by 40"],
)
def test_sums_of_few_and_of_many(
    batch: int, shape: tuple[int, ...], dense: bool, dtype: torch.dtype, backend: str
) -> None:
    """Whole and cut blocks of pairs, some of them forbidden, with a gradient that is one pair's or
    a sum over batch elements and heads."""
    generator = torch.Generator().manual_seed(batch)
    device = device_of(backend)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    q, k, v = draw(batch, 2, 37, 16), draw(batch, 2, 77, 16), draw(batch, 2, 77, 16)
    bias = draw(*shape)
    bias[..., 5] = -torch.inf
    mask = Dense(draw(batch, 1, 37, 77) > -0.5) if dense else None
    arguments = random_gradients(AttentionCase(q, k, v, mask, bias), generator)
    assert_parity(run(backend, arguments), arguments)
