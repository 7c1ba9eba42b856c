"""Philox4x32-10 (Salmon et al. 2011) in Triton: the words of `reference/philox.py`, bit by bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Four uint32 words for each counter (c0, c1, c2, c3), uint32 tensors of one shape.

    `seed`: the int64 key, low word first.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + w0, k1 + w1
    return c0, c1, c2, c3


@triton.jit
def load_seed(seed):
    """The key as an int64 scalar, from a pointer to it or from the value itself."""
    if seed.dtype.is_ptr():
        return tl.load(seed)
    return seed.to(tl.int64)
