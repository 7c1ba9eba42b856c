"""Arguments that all launches prepare alike: device, dropout, seed, contiguous mask tensors."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import interpreting

if interpreting():  # every module that launches a kernel comes by here
    from .interpreter import repair

    repair()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; on the CPU, in the interpreter, there is none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def seed_on_device(seed: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The seed on the tensor's device: kernels read it there, and the host never waits for it."""
    if seed is None or seed.device == tensor.device:
        return seed
    return torch.full((), int(seed), dtype=torch.int64, device=tensor.device)


def dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, float, Tensor | None]:
    """The threshold of a kept word, 1 / (1 - p), and the seed: None without dropout."""
    if dropout_p == 0.0 or seed is None:
        return 0, 1.0, None
    # p = 1 wants 2**32, one more than a word holds; its keep_scale of 0 drops what is left
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return threshold, 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0, seed
