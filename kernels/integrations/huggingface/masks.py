"""The masks that transformers asks a mask function for, in terms of rowmax's own.

transformers describes a mask by a function of indices; those that its models use most are known
here. A mask on a GPU is made without a look at any value, and remembers what it was made from:
layers are then handed a causal band, a window or padding, and none of them waits for the device.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...api.masks import Align, Causal, Documents, KeyLengths, Mask, Window
from ..tensor_masks import remember

# Padded to this many ids, rows of them are aligned alike for every length of a growing cache.
_ALIGNED = 16


def note(allowed: Tensor, arguments: dict[str, Any]) -> None:
    """Remembers the structure of what `sdpa_mask` made of `arguments`, where it is known."""
    if allowed.is_cpu or torch.compiler.is_compiling() or allowed.dim() != 4:
        return
    batch, _, query_len, key_len = allowed.shape
    key_offset = arguments.get("kv_offset", 0)
    if "cache_position" in arguments:  # transformers 4
        query_offset = arguments["cache_position"][0]
    else:
        query_offset = arguments.get("q_offset", 0)
    offset = query_offset - key_offset
    align: Align = offset.reshape(1).expand(batch) if isinstance(offset, Tensor) else offset
    from transformers.masking_utils import causal_mask_function

    parts = _parts(arguments.get("mask_function", causal_mask_function), align)
    if parts is None:
        return
    padding = arguments.get("attention_mask")
    if padding is not None:
        real = padding[:, key_offset : key_offset + key_len].bool()
        parts += _padding(torch.nn.functional.pad(real, (0, key_len - real.shape[1])), query_len)
    if parts:
        remember(allowed, functools.reduce(operator.and_, parts))


def _parts(function: Callable[..., Any], align: Align) -> list[Mask] | None:
    """Masks that together are `function`, query 0 standing at `align`; None for an unknown one."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return [Causal(align)]
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return []
    kind = getattr(function, "__qualname__", "")
    held = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if kind == "sliding_window_overlay.<locals>.inner_mask":
        return [Window(held["sliding_window"] - 1, None, align)]
    if kind == "and_masks.<locals>.and_mask":
        found = [_parts(part, align) for part in held["mask_functions"]]
        return None if None in found else [mask for part in found for mask in part or ()]
    return None


def _padding(real: Tensor, query_len: int) -> list[Mask]:
    """Keys that are real (B, Lk), wherever padding lies; kernels stop after the last of them."""
    batch, key_len = real.shape
    ends = (real * torch.arange(1, key_len + 1, device=real.device)).amax(1)
    width = -(-key_len // _ALIGNED) * _ALIGNED
    key_ids = torch.zeros((batch, width), dtype=torch.int64, device=real.device)[:, :key_len]
    ids = torch.ones((batch, query_len), dtype=torch.int64, device=real.device)
    return [KeyLengths(ends), Documents(ids, key_ids.copy_(real))]
