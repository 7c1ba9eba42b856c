"""Philox4x32-10 (Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3') in PyTorch.

A weight drops where its 32-bit word is below `keep_threshold(p)` = round(p * 2**32): integers are
compared, so that every backend drops exactly the same ones. The key is the 64-bit seed, low word
first; four neighbouring keys (columns) share one counter:

- attention: (key // 4, query, head, batch), word key % 4;
- rows of a norm: (column // 4, row % 2**32, row // 2**32, NORM_STREAM), word column % 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
NORM_STREAM = 0x6E6F726D
_WORD = 0xFFFFFFFF


def keep_threshold(dropout_p: float) -> int:
    """Words below this drop: in [0, 2**32]."""
    return round(dropout_p * 2**32)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words (int64 tensors holding 32 bits) a counter; counters broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # int64 products wrap, and all 64 bits of the unsigned product are in them
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def attention_keep(
    seed: Tensor, dropout_p: float, shape: tuple[int, int, int, int], batch_start: int = 0
) -> Tensor:
    """bool (B, Hq, Lq, Lk): True where the weight is kept."""
    batch, heads, query_len, key_len = shape
    device = seed.device
    b = torch.arange(batch_start, batch_start + batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=device).view(-1, 1, 1)
    i = torch.arange(query_len, device=device).view(-1, 1)
    group = torch.arange((key_len + 3) // 4, device=device)
    words = torch.broadcast_tensors(*philox4x32((group, i, h, b), seed))
    return _kept(words, key_len, dropout_p)


def rows_keep(seed: Tensor, dropout_p: float, rows: int, columns: int) -> Tensor:
    """bool (rows, columns): True where the element is kept."""
    device = seed.device
    row = torch.arange(rows, device=device).view(-1, 1)
    group = torch.arange((columns + 3) // 4, device=device)
    stream = torch.tensor(NORM_STREAM, device=device)
    words = torch.broadcast_tensors(*philox4x32((group, row & _WORD, row >> 32, stream), seed))
    return _kept(words, columns, dropout_p)


def _kept(words: tuple[Tensor, ...] | list[Tensor], length: int, dropout_p: float) -> Tensor:
    flat = torch.stack(tuple(words), dim=-1).flatten(-2)[..., :length]
    return flat >= keep_threshold(dropout_p)


def keep_scale(dropout_p: float) -> float:
    """What kept weights are multiplied by: 1 / (1 - p); with p = 1 nothing is kept."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
