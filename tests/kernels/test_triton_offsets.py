"""Offsets of more than 31 bits, in Triton's interpreter, whose 32-bit integers wrap as a GPU's do.

A tensor's elements lie gigabytes apart in memory that is reserved and never touched between them.
"""

from __future__ import annotations

import functools
import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels import Dense, attention, attention_varlen
from rowmax.kernels.backends import dispatch

from .. import tensors
from .backends import is_interpreted

if dispatch.unavailable("triton") is not None:
    pytest.skip(str(dispatch.unavailable("triton")), allow_module_level=True)
if not is_interpreted("triton") or not sys.platform.startswith("linux"):
    pytest.skip("for the interpreter on Linux", allow_module_level=True)

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
# (elements from one to the next, how many): 32 bits hold the step alone, or not even that
STEPS = {"30 bits": (2**30 + 32, 4), "31 bits": (2**31 + 32, 2)}
EVERY_STEP = pytest.mark.parametrize("step,count", STEPS.values(), ids=STEPS)
draw = functools.partial(tensors.rand, dtype=torch.float32)


def far(near: Tensor, dim: int, step: int) -> Tensor:
    """`near` with `step` elements from one to the next in dimension `dim`."""
    strides = list(near.contiguous().stride())
    strides[dim] = step
    extent = 1 + sum((size - 1) * stride for size, stride in zip(near.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    memory = mmap.mmap(-1, extent * near.itemsize, flags=flags)
    apart = torch.frombuffer(memory, dtype=near.dtype).as_strided(near.shape, strides)
    assert (near.shape[dim] - 1) * step >= 2**31
    return apart.copy_(near)


def results(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The output and the gradients of q, k, v and the bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    q, k, v, *bias = leaves
    out = attention(q, k, v, bias=bias[0] if bias else None, backend="triton", **options)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_same(near: list[Tensor], at: int, dim: int, step: int, **options: Any) -> None:
    apart = [far(x, dim, step) if index == at else x for index, x in enumerate(near)]
    for got, expected in zip(results(apart, **options), results(near, **options), strict=True):
        assert torch.equal(got, expected)


@EVERY_STEP
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("at", [0, 1, 2, 3], ids=["q", "k", "v", "bias"])
def test_attention(at: int, dim: int, step: int, count: int) -> None:
    sizes = {"batch": 1, "head": 2, "row": 5}
    sizes[list(sizes)[dim]] = count
    batch, heads, rows = sizes.values()
    near = [draw(batch, heads, rows, 16) for _ in range(3)]
    if at == 3:
        near.append(draw(batch, heads, rows, rows))
    assert_same(near, at, dim, step)


@EVERY_STEP
def test_decoding(step: int, count: int) -> None:
    """Keys split over programs."""
    near = [draw(count, 2, 1, 16), draw(count, 1, 1024, 16), draw(count, 1, 1024, 16)]
    for at in range(3):
        assert_same(near, at, 0, step)


@EVERY_STEP
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_a_dense_mask(dim: int, step: int, count: int) -> None:
    sizes = [1, 1, 5]
    sizes[dim] = count
    allowed = draw(*sizes, 5) > -1.0
    near = [draw(sizes[0], 4 if dim == 1 else 2, max(5, sizes[2]), 16) for _ in range(3)]
    if dim == 1:
        near = [draw(1, count, 5, 16) for _ in range(3)]
    if dim == 2:
        near = [draw(1, 2, count, 16), draw(1, 2, 5, 16), draw(1, 2, 5, 16)]
    expected = results(near, mask=Dense(allowed))
    for got, one in zip(results(near, mask=Dense(far(allowed, dim, step))), expected, strict=True):
        assert torch.equal(got, one)


@EVERY_STEP
def test_packed_rows(step: int, count: int) -> None:
    near = draw(count, 2, 16)
    starts = torch.tensor([0, 1, count])
    apart = far(near, 0, step)
    got = attention_varlen(apart, apart, apart, starts, starts, backend="triton")
    assert torch.equal(got, attention_varlen(near, near, near, starts, starts, backend="triton"))
