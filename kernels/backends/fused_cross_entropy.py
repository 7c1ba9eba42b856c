"""Linear cross entropy by chunks of tokens: products by torch, the rows of logits by a backend.

The logits of a chunk become their own gradient in place, so that no more of them exist at a time;
loss and both gradients take the three products that they take unfused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..ops.layout import statistics_dtype
from ..ops.problem import LinearCrossEntropyProblem

# Tokens of a chunk. Fewer would make the sum of d_weight, read and written once a chunk, costly.
_MIN_CHUNK = 256
# Logits of a chunk: for a CPU about 10 MB in float32, for a GPU enough to fill it.
_CHUNK_LOGITS = {"cpu": 2_621_440}
_CHUNK_LOGITS_GPU = 1 << 26


class CrossEntropyRows(Protocol):
    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        label_smoothing: float,
        ignore_index: int,
        with_gradient: bool,
    ) -> Tensor:
        """The losses (T,) of logits (T, V), in the dtype of statistics; the logits are overwritten
        with p - q if asked for. Both are 0 where the target is `ignore_index`, NaN where no word.
        """


def linear_cross_entropy_by(
    rows: CrossEntropyRows,
) -> Callable[[LinearCrossEntropyProblem], tuple[Tensor, Tensor | None, Tensor | None]]:
    """What `dispatch.Backend` asks for, of a backend with this kernel of rows."""
    return functools.partial(_linear_cross_entropy, rows=rows)


def _linear_cross_entropy(
    problem: LinearCrossEntropyProblem, *, rows: CrossEntropyRows
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss; d_x and d_weight of the sum, d_weight in the dtype of statistics, or None."""
    x, weight, target, label_smoothing, ignore_index, mean, x_grad, weight_grad = problem
    tokens, vocabulary = x.shape[0], weight.shape[0]
    if x.is_cpu:
        _check_targets(target, ignore_index, vocabulary)
    statistics = statistics_dtype(x.dtype)
    losses = [x.new_zeros(0, dtype=statistics)]
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if x_grad else None
    d_weight = weight.new_zeros(weight.shape, dtype=statistics) if weight_grad else None
    chunk = min(tokens, chunk_tokens(vocabulary, x.device.type))
    logits = x.new_empty(chunk, vocabulary)
    product = weight.new_empty(weight.shape if statistics != x.dtype and weight_grad else 0)
    target = target.contiguous()
    for start in range(0, tokens, max(1, chunk)):
        here = slice(start, min(start + chunk, tokens))
        part, scores = x[here], logits[: min(chunk, tokens - start)]
        torch.mm(part, weight.t(), out=scores)
        losses.append(
            rows(scores, target[here], label_smoothing, ignore_index, x_grad or weight_grad)
        )
        if d_x is not None:
            torch.mm(scores, weight, out=d_x[here])
        if d_weight is not None and d_weight.dtype == x.dtype:
            d_weight.addmm_(scores.t(), part)
        elif d_weight is not None:
            # a mean: the sum of a chunk may be beyond the half type
            torch.addmm(product, scores.t(), part, beta=0, alpha=1.0 / len(part), out=product)
            d_weight.add_(product, alpha=len(part))
    loss = torch.cat(losses).sum()
    if mean:
        loss = loss / (target != ignore_index).sum()
    return loss, d_x, d_weight


def chunk_tokens(vocabulary: int, device_type: str) -> int:
    """Tokens whose logits exist at a time."""
    logits = _CHUNK_LOGITS.get(device_type, _CHUNK_LOGITS_GPU)
    return max(_MIN_CHUNK, logits // max(1, vocabulary) // 64 * 64)


def _check_targets(target: Tensor, ignore_index: int, vocabulary: int) -> None:
    wrong = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if wrong.any():
        raise IndexError(
            f"linear_cross_entropy: `target`: expected words from 0 to {vocabulary - 1}, or "
            f"ignore_index = {ignore_index}, got {int(target[wrong][0])}"
        )
