"""Linear maps, those without a gradient by the faster of two libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.ops.fast_path import are_ordinary, nothing_watches
from ..kernels.ops.torch_internals import onednn_linear

# Multiplications of a product from which on oneDNN is faster than MKL, of which torch's own linear
# maps are, by 5 to 30 % (AMD Zen 4, 1 and 2 threads); below it each call costs 10 us more.
_LARGE = 2**24


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; (..., N), (M, N), (M,) -> (..., M)."""
    # (what does not fit, or is broadcast, is torch's to refuse or to do)
    fits = x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    onednn = _onednn_for(x.numel() * weight.shape[0], x, weight, bias) if fits else None
    return F.linear(x, weight, bias) if onednn is None else onednn[0](x, weight, bias)


def linear_by(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """`linear` by one weight, as it is now, for many products of at most so many rows.

    oneDNN's own layout of the weight, a copy, is made once in place of in each product.
    """
    onednn = _onednn_for(rows * weight.numel(), weight)
    if onednn is None:
        return lambda x: linear(x, weight)
    multiply, reorder = onednn
    reordered = reorder(weight, rows)
    return lambda x: multiply(x, reordered, None)


def _onednn_for(multiplications: int, *tensors: Tensor | None) -> Any:
    """What `onednn_linear` gives, where that is to compute this product; else None."""
    if (
        multiplications < _LARGE
        or not torch.is_inference_mode_enabled()
        or not torch.backends.mkldnn.enabled
        or not nothing_watches()
        or not are_ordinary(tensors)
    ):
        return None
    plain = all(each is None or (each.is_cpu and each.dtype == torch.float32) for each in tensors)
    return _onednn() if plain else None


_onednn = functools.cache(onednn_linear)
