"""Linear maps, those without a gradient by the faster of two libraries."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..kernels.ops.fast_path import are_ordinary, nothing_watches
from ..kernels.ops.torch_internals import onednn_linear

# Multiplications of a product from which on oneDNN is faster than MKL, of which torch's own linear
# maps are, by 5 to 30 % (AMD Zen 4, 1 and 2 threads); below it each call costs 10 us more.
_LARGE = 2**24
# The same for a weight that is in oneDNN's own layout before the call, for more than one row: the
# multiplications, or else the numbers of the weight.
_LARGE_LAID_OUT, _LARGE_WEIGHT = 2**22, 2**18


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; (..., N), (M, N), (M,) -> (..., M)."""
    # (what is traced, does not fit, or is broadcast, is torch's to do or to refuse)
    if not is_compiling() and _fits(x, weight, bias):
        laid_out = _laid_out.get()
        if laid_out is not None and (ready := laid_out.of(weight, x, bias)) is not None:
            return _onednn()[0](x, ready, bias)
        if x.numel() * weight.shape[0] >= _LARGE and _is_for_onednn(x, weight, bias):
            return _onednn()[0](x, weight, bias)
    return F.linear(x, weight, bias)


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Within it the parameters by which this thread multiplies do not change.

    From its second product on such a weight then is in oneDNN's own layout, where that is faster;
    the copies are dropped at the end of the outermost.
    """
    outer = _laid_out.get()
    if outer is not None and outer.is_open:
        yield
        return
    laid_out = _LaidOut()
    before = _laid_out.set(laid_out)
    try:
        yield
    finally:
        _laid_out.reset(before)
        laid_out.close()  # a task or a generator may have a copy of the context


class _LaidOut:
    """Weights in oneDNN's own layout."""

    def __init__(self) -> None:
        # By the weight's id, which is not given to another while the weight is here; None: once
        self._found: dict[int, tuple[Tensor, Tensor | None]] | None = {}

    @property
    def is_open(self) -> bool:
        return self._found is not None

    def close(self) -> None:
        self._found = None

    def of(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The weight for a product like this one, where oneDNN is to compute it; else None."""
        # (a weight that is computed, of which there is another for each product, is no parameter)
        if self._found is None or type(weight) is not nn.Parameter:
            return None
        found = self._found.get(id(weight))
        rows, numbers = x.numel() // max(1, x.shape[-1]), weight.numel()
        large = numbers >= _LARGE_WEIGHT or rows * numbers >= _LARGE_LAID_OUT
        if (found is None and (rows < 2 or not large)) or not _is_for_onednn(x, weight, bias):
            return None
        if found is None:
            self._found[id(weight)] = weight, None
            return None
        laid_out = found[1]
        if laid_out is None:
            laid_out = _onednn()[1](weight, rows)
            self._found[id(weight)] = weight, laid_out
        return laid_out


_laid_out: ContextVar[_LaidOut | None] = ContextVar("laid_out", default=None)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    matrices = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    return matrices and (bias is None or bias.shape == weight.shape[:1])


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing but the numbers of these tensors is asked of their product.

    (oneDNN reads a bias of any strides as if its numbers stood side by side.)
    """
    tensors = x, weight, bias
    return (
        torch.is_inference_mode_enabled()
        and bool(torch.backends.mkldnn.enabled)
        and nothing_watches()
        and are_ordinary(tensors)
        and all(each is None or (each.is_cpu and each.dtype == torch.float32) for each in tensors)
        and weight.is_contiguous()
        and (bias is None or bias.is_contiguous())
        and _onednn() is not None
    )


@functools.cache
def _onednn() -> Any:
    return onednn_linear()
