"""Half types in the Numba kernels: what a load widens and what a store rounds, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rowmax.kernels.backends import dispatch

from .backends import dtype_name

if dispatch.unavailable("numba") is not None:
    pytest.skip(str(dispatch.unavailable("numba")), allow_module_level=True)

from rowmax.kernels.backends.cpu_common.call_records import INTEGER, fields
from rowmax.kernels.backends.cpu_numba.call import Kernel, read
from rowmax.kernels.backends.cpu_numba.gemm import lanes_in, lanes_of
from rowmax.kernels.backends.cpu_numba.jit import jit
from rowmax.kernels.backends.cpu_numba.memory import load, load_first, pointer, store, store_first

LANES = lanes_in(torch.float32)
EVERY_HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)


@jit
def copy(source, target, count, lanes):
    """target[:count] = source[:count], whole vectors and then what is left."""
    whole = count // lanes * lanes
    for c in range(0, whole, lanes):
        store(target + c, load(source + c))
    store_first(target + whole, load_first(source + whole, count - whole), count - whole)


def widen(argument):
    """From the half type to float32."""
    call = read(argument)
    source, target = pointer(call.source, call.item), pointer(call.target, call.zero)
    copy(source, target, call.count, lanes_of(call.zero))


def narrow(argument):
    """From float32 to the half type."""
    call = read(argument)
    source, target = pointer(call.source, call.zero), pointer(call.target, call.item)
    copy(source, target, call.count, lanes_of(call.zero))


WIDEN = Kernel(widen, fields(INTEGER, "source target count"))
NARROW = Kernel(narrow, fields(INTEGER, "source target count"))


def moved(kernel: Kernel, source: Tensor, to: torch.dtype) -> Tensor:
    """`source` in the other type, and a test that nothing beyond it was written."""
    half = to if source.dtype == torch.float32 else source.dtype
    guard = 2 * LANES
    target = torch.full((source.numel() + guard,), -7.0, dtype=to)
    record = {"source": source.data_ptr(), "target": target.data_ptr(), "count": source.numel()}
    kernel.plan(half, 1, 0, record).run()
    assert (target[source.numel() :] == -7.0).all()
    return target[: source.numel()]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Bit by bit, signs of zeros too; a NaN need only be one."""
    numbers = ~expected.isnan()
    assert torch.equal(got.isnan(), ~numbers)
    assert torch.equal(bits(got)[numbers], bits(expected)[numbers])


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@EVERY_HALF
def test_every_pattern_loads_exactly(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    assert_same_bits(moved(WIDEN, values, torch.float32), values.float())


@EVERY_HALF
def test_every_pattern_comes_back(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    assert_same_bits(moved(NARROW, values.float(), dtype), values)


@EVERY_HALF
def test_stores_round_to_nearest_even(dtype: torch.dtype) -> None:
    """Between all neighbours: the tie, one float32 above and below it; and what overflows."""
    values = every_value(dtype).float()
    values = values[values.isfinite()].unique()
    ties = (values[1:].double() + values[:-1].double()).div(2).float()
    largest = torch.tensor([torch.finfo(dtype).max], dtype=torch.float64)
    # the step to what would come next, had the type a larger exponent
    beyond = (largest + torch.finfo(dtype).eps * 2.0 ** largest.log2().floor() / 2).float()
    ties = torch.cat((ties, beyond, -beyond))
    infinity = torch.tensor(torch.inf)
    for source in (ties, ties.nextafter(infinity), ties.nextafter(-infinity)):
        assert_same_bits(moved(NARROW, source, dtype), source.to(dtype))


@EVERY_HALF
def test_stores_of_what_is_no_number_or_too_small(dtype: torch.dtype) -> None:
    payloads = torch.tensor([0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF])
    patterns = torch.cat((payloads, payloads - 2**31)).to(torch.int32)  # signalling and quiet NaN
    rest = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38])
    source = torch.cat((patterns.view(torch.float32), rest))
    assert_same_bits(moved(NARROW, source, dtype), source.to(dtype))


@EVERY_HALF
def test_stores_round_random_patterns_as_torch_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)
    source = patterns.view(torch.float32)
    assert_same_bits(moved(NARROW, source, dtype), source.to(dtype))


@EVERY_HALF
def test_any_number_of_elements_at_any_alignment(dtype: torch.dtype) -> None:
    for count in range(1, 3 * LANES):
        values = torch.arange(count + 1).to(dtype)[1:]  # two bytes off
        assert_same_bits(moved(WIDEN, values, torch.float32), values.float())
        assert_same_bits(moved(NARROW, values.float(), dtype), values)
