"""Linear maps, those without a gradient by the faster of two libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
    if torch.is_inference_mode_enabled() and x.numel() * len(weight) >= _LARGE:
        by_onednn = _by_onednn()
        if (
            by_onednn is not None
            and x.is_cpu
            and x.dtype == weight.dtype == torch.float32
            and torch.backends.mkldnn.enabled
            and nothing_watches()
            and are_ordinary((x, weight, bias))
        ):
            return by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


_by_onednn: Callable[[], Callable[..., Tensor] | None] = functools.cache(onednn_linear)
