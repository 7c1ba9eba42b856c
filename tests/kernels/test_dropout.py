"""Dropout: Philox's published vectors, the same weights on every backend, and the seed's rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rowmax.kernels import add_layer_norm, attention
from rowmax.kernels.backends.reference import attention_keep, keep_threshold, philox4x32, rows_keep

from . import loops
from .backends import BACKENDS, device_of

# Random123's kat_vectors, philox4x32 10: counter, key, result
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("counter,key,result", KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in words(counter))
    low, high = words(key)
    got = philox4x32((c0, c1, c2, c3), torch.tensor(signed(high << 32 | low)))
    assert [int(word) for word in got] == words(result)
    assert loops.philox4x32(words(counter), [low, high]) == words(result)


def test_counters_of_attention_and_of_rows() -> None:
    seed, p = -(2**35) - 17, 0.37
    keep = attention_keep(torch.tensor(seed), p, (2, 3, 5, 11), batch_start=4)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 4, 10), (0, 1, 3, 7), (1, 0, 2, 6)):
        assert bool(keep[b, h, i, j]) == loops.keeps(seed, p, b + 4, h, i, j)
    rows = rows_keep(torch.tensor(seed), p, 6, 9)
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for row, column in ((0, 0), (5, 8), (3, 6)):
        word = loops.philox4x32([column // 4, row, 0, 0x6E6F726D], key)[column % 4]
        assert bool(rows[row, column]) == (word >= round(p * 2**32))


def kept_by(backend: str, p: float, seed: int | Tensor | None, size: int = 37) -> Tensor:
    """Which weights of a (2, 3, size, size) attention survive: with v = 1, out is the weights."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, size, 8, generator=generator).to(device_of(backend)) for _ in "qk")
    v = torch.eye(size, device=q.device).expand(2, 3, size, size)
    return (attention(q, k, v, dropout_p=p, seed=seed, backend=backend) != 0).cpu()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_every_backend_drops_the_same_weights(backend: str, p: float, seed: int) -> None:
    expected = attention_keep(torch.tensor(seed), p, (2, 3, 37, 37))
    assert torch.equal(kept_by(backend, p, seed), expected)
    assert torch.equal(kept_by(backend, p, torch.tensor(seed)), expected)


def test_backward_drops_the_same_weights(backend: str) -> None:
    """With the identity as grad_out, d_v is the transposed weights after dropout."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 21, 8, generator=generator).to(device_of(backend)) for _ in "qk")
    v = torch.zeros(2, 3, 21, 21, device=q.device, requires_grad=True)
    out = attention(q, k, v, dropout_p=0.4, seed=5, backend=backend)
    out.backward(torch.eye(21, device=q.device).expand_as(out).contiguous())
    assert v.grad is not None
    keep = attention_keep(torch.tensor(5), 0.4, (2, 3, 21, 21))
    assert torch.equal((v.grad != 0).cpu(), keep.mT)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("norm_backend", BACKENDS)
def test_every_backend_drops_the_same_elements_of_a_row(norm_backend: str, p: float) -> None:
    x = torch.ones(3, 5, 13, device=device_of(norm_backend))
    _, total = add_layer_norm(x, torch.zeros_like(x), dropout_p=p, seed=9, backend=norm_backend)
    keep = rows_keep(torch.tensor(9), p, 15, 13).view(3, 5, 13)
    assert torch.equal((total != 0).cpu(), keep)
    if p < 1:
        torch.testing.assert_close(total.cpu(), keep / (1 - p))


def test_the_default_generator_draws_the_seed(backend: str) -> None:
    torch.manual_seed(7)
    first, second = kept_by(backend, 0.5, None), kept_by(backend, 0.5, None)
    torch.manual_seed(7)
    assert torch.equal(kept_by(backend, 0.5, None), first)
    assert not torch.equal(first, second)


def test_a_given_seed_and_no_dropout_leave_the_generator_alone(backend: str) -> None:
    before = torch.get_rng_state()
    kept_by(backend, 0.5, 3)
    kept_by(backend, 0.0, None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_rate_is_p_and_seeds_are_independent(p: float) -> None:
    keeps = [attention_keep(torch.tensor(seed), p, (2, 2, 128, 128)) for seed in (1, 2)]
    deviation = (p * (1 - p) / keeps[0].numel()) ** 0.5
    for keep in keeps:
        assert abs(keep.double().mean().item() - (1 - p)) < 5 * deviation
    both = (keeps[0] & keeps[1]).double().mean().item()
    assert abs(both - (1 - p) ** 2) < 5 * deviation


def test_the_threshold_is_an_integer() -> None:
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(1.0) == 2**32
