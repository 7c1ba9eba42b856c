"""The repaired parts of Triton's interpreter agree with torch."""

from __future__ import annotations

import pytest
import torch

from ..processes import printed

pytest.importorskip("triton")

from rowmax.kernels import attention
from rowmax.kernels.backends.gpu_triton import interpreting

if not interpreting():
    pytest.skip("Triton compiles here", allow_module_level=True)

from rowmax.kernels.backends.gpu_triton.interpreter import to_bfloat16, to_float32

OUTSIDE_THE_TESTS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from rowmax.kernels import attention
q, k, v = (torch.linspace(-2, 2, 640).cos().add(n).view(1, 2, 20, 16) for n in range(3))
halves = [tensor.to(torch.bfloat16) for tensor in (q, k, v)]
out = attention(*halves, backend="triton")
expected = attention(*(tensor.double() for tensor in halves), backend="reference")
print(float((out - expected).abs().max() / expected.abs().max()))
"""


def test_bfloat16_is_right_for_whoever_sets_the_variable() -> None:
    """In a process that loads nothing of the tests."""
    assert float(printed("-c", OUTSIDE_THE_TESTS)) < 0.02


def test_bfloat16_rounds_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    special = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0, 1])
    values = torch.cat((bits, special.to(torch.int32))).view(torch.float32)
    expected = values.to(torch.bfloat16)
    patterns = to_bfloat16(values.numpy())
    got = torch.from_numpy(patterns.view("int16")).view(torch.bfloat16)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    widened = torch.from_numpy(to_float32(patterns))
    torch.testing.assert_close(widened, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_overflows_are_not_looked_for_where_nobody_is_told() -> None:
    """It doubles the time of every integer sum and product, and tells in debug mode alone."""
    from triton.runtime.interpreter import interpreter_builder

    zeros = torch.zeros(1, 1, 1, 16)
    attention(zeros, zeros, zeros, backend="triton")
    options = interpreter_builder.options
    assert options.sanitize_overflow == options.debug
