"""The repaired parts of Triton's interpreter agree with torch."""

from __future__ import annotations

import torch

from .interpreter import to_bfloat16, to_float32


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
