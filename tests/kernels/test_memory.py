"""Peak memory of attention, forward and backward: O(L), no Lq x Lk buffer."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..processes import printed
from .backends import BACKENDS

MIB = 2**20

SCRIPT = """
import sys
import torch
from rowmax.kernels import Causal, KeyLengths, attention
from rowmax.kernels.testing import peak_bytes

backend, length = sys.argv[1], int(sys.argv[2])


def call(length):
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in "qkv")
    bias = torch.zeros(length, requires_grad=True)
    mask = Causal() & KeyLengths(torch.tensor([length - 3]))
    out = attention(q, k, v, mask, bias, dropout_p=0.1, seed=1, backend=backend)
    out.backward(torch.ones_like(out))


call(64)
print(peak_bytes(lambda: call(length), "cpu"))
"""


def peak(backend: str, length: int) -> int:
    """Bytes by which one forward and backward at this length raises the resident memory."""
    return int(printed("-c", SCRIPT, backend, str(length)))


def linear(length: int) -> int:
    """q, k, v, out and their four gradients (length, 64) in float32, three times over."""
    return 3 * 8 * length * 64 * 4 + 16 * MIB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name not in ("reference", "triton")]
)
def test_fused_attention_needs_linear_memory(backend: str) -> None:
    assert peak(backend, 8192) < linear(8192) < 8192 * 8192 * 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_measure_finds_the_scores_of_the_reference() -> None:
    assert peak("reference", 4096) > 4096 * 4096 * 4 > linear(4096)
