"""docs/migration.md: what stands on the right gives what stands on the left."""

from __future__ import annotations

import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migration.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n", PAGE, re.M | re.S)
IS_TRANSFORMERS = "LlamaConfig"


def naive(q: Tensor, k: Tensor, v: Tensor, forbidden: Tensor, bias: Tensor | float = 0) -> Tensor:
    """(B, L, H, D), as flash-attention and xFormers have it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias).masked_fill(forbidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def places(q: Tensor, k: Tensor, at_end: bool) -> Tensor:
    """j - i, the last query at the last key or the first at the first."""
    i, j = torch.arange(q.shape[1]).view(-1, 1), torch.arange(k.shape[1])
    return j - i - (k.shape[1] - q.shape[1] if at_end else 0)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """As flash-attention's docstring has it: both masks are aligned to the bottom right corner."""
    distance = places(q, k, at_end=True)
    left, right = window_size
    forbidden = (distance > 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        forbidden = forbidden | (distance < -left)
    if right >= 0:
        forbidden = forbidden | (distance > right)
    return naive(q, k, v, forbidden)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *_: int, causal: bool
) -> Tensor:
    rows = [
        flash_attn_func(
            q[None, starts_q[b] : starts_q[b + 1]],
            k[None, starts_k[b] : starts_k[b + 1]],
            v[None, starts_k[b] : starts_k[b + 1]],
            causal,
        )[0]
        for b in range(len(starts_q) - 1)
    ]
    return torch.cat(rows)


class LowerTriangularMask:
    """xFormers': it starts at the top left corner."""


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
    distance = places(q, k, at_end=False)
    if isinstance(attn_bias, LowerTriangularMask):
        return naive(q, k, v, distance > 0)
    return naive(q, k, v, torch.zeros_like(distance, dtype=torch.bool), attn_bias)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the libraries that want a GPU, what their documentation says."""
    flash: Any = types.ModuleType("flash_attn")
    flash.flash_attn_func, flash.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    xformers: Any = types.ModuleType("xformers")
    ops: Any = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    ops.LowerTriangularMask = LowerTriangularMask
    xformers.ops = ops
    for module in (flash, xformers, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_both_sides_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    pairs = 0
    for block in BLOCKS:
        if IS_TRANSFORMERS in block:
            pytest.importorskip("transformers", reason="needs rowmax[huggingface]")
        if "from flash_attn" in block:  # not before, or transformers would ask for its version
            stand_in(monkeypatch)
        exec(block, names)
        if "new" in names:
            old, new = names.pop("old"), names.pop("new")
            assert old.std() > 0.01, block
            torch.testing.assert_close(new, old, msg=partial("{}\n{}".format, block))
            pairs += 1
        else:
            assert ("old" in names) == (block is not BLOCKS[0]), block
    assert pairs == (len(BLOCKS) - 1) // 2 >= 19


def test_every_left_side_has_a_right_one() -> None:
    """A side by side block of the page, where the site shows them so."""
    for grid in re.findall(r'^<div class="grid" markdown>\n(.*?)^</div>', PAGE, re.M | re.S):
        sides = re.findall(r"^```python\n(.*?)^```\n", grid, re.M | re.S)
        for at, side in enumerate(sides):
            name = "new" if at % 2 else "old"
            assert re.search(rf"^{name}(, _)? = ", side, re.M), side
            assert max(map(len, side.splitlines())) <= 46, f"wider than its column: {side}"
