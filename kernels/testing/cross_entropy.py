"""The cases of linear_cross_entropy: torch's own projection and loss, naive and in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Draw, NamedCase, seed_of
from .oracle import Kernel, Results, TestCase, expected_of, gradients_of, on_device, outputs_of
from .tolerance import Expected

# kind -> the options of a call; the share of tokens that are ignored; what the logits are times
KINDS: dict[str, tuple[dict[str, Any], float, float]] = {
    "none": ({}, 0.0, 1.0),
    "smoothing": ({"label_smoothing": 0.1}, 0.0, 1.0),
    "smoothing-only": ({"label_smoothing": 1.0}, 0.0, 1.0),
    "ignored": ({"label_smoothing": 0.1, "ignore_index": 0}, 0.4, 1.0),
    "sum": ({"reduction": "sum"}, 0.2, 1.0),
    "large-logits": ({"label_smoothing": 0.1}, 0.0, 60.0),
}
# Tokens, columns and words of the vocabulary.
QUICK_SHAPES = ((7, 5, 11), (33, 24, 515))
SHAPES = (*QUICK_SHAPES, (1, 1, 1), (300, 40, 70), (4, 8, 5003), (0, 8, 5))


@dataclass(frozen=True)
class CrossEntropyCase:
    """One call of `linear_cross_entropy`.

    x (T, N), weight (V, N), target (T,); options: label_smoothing, ignore_index, reduction.
    grad_loss () is the gradient that the loss receives.

    `kernel(x, weight, target, label_smoothing=..., ...)` gets the options that are given, and
    returns the loss () in the dtype of sums.
    """

    x: Tensor
    weight: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    grad_loss: Tensor | None = None

    op = "linear_cross_entropy"

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @cached_property
    def expected(self) -> dict[str, Expected]:
        exact, naive = self._equation(torch.float64), self._equation(self.x.dtype)
        terms = max(*self.x.shape, len(self.weight))
        return expected_of(exact, naive, self._magnitudes(), terms)

    def run(self, kernel: Kernel, device: torch.device | str | None = None) -> Results:
        device = torch.device(device or self.x.device)
        leaves = self._leaves(self.x.dtype, device)
        returned = kernel(leaves["x"], leaves["weight"], self.target.to(device), **self.options)
        return on_device(self._results(leaves, outputs_of(returned)), self.x.device)

    def forward_only(self) -> CrossEntropyCase:
        return replace(self, grad_loss=None)

    def _leaves(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        tensors = {"x": self.x, "weight": self.weight}
        return {
            name: tensor.detach().to(device, dtype).requires_grad_()
            for name, tensor in tensors.items()
        }

    def _equation(self, dtype: torch.dtype) -> Results:
        """Torch's own, the logits in `dtype`, the loss in float32 or wider."""
        leaves = self._leaves(dtype, self.x.device)
        logits = F.linear(leaves["x"], leaves["weight"])
        loss = F.cross_entropy(
            logits.to(torch.promote_types(dtype, torch.float32)), self.target, **self.options
        )
        return self._results(leaves, (loss,))

    def _results(self, leaves: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> Results:
        if len(outputs) != 1:
            raise TypeError(f"a kernel of {self.op}: expected one tensor, got {len(outputs)}")
        return gradients_of({"loss": outputs[0]}, (self.grad_loss,), leaves)

    def _magnitudes(self) -> Results:
        """Sums of the terms' magnitudes: a logit's error is eps times that of its own terms."""
        x, weight = self.x.detach().double(), self.weight.detach().double()
        smoothing = self.options.get("label_smoothing", 0.0)
        used = self.target != self.options.get("ignore_index", -100)
        count = used.sum() if self.options.get("reduction", "mean") == "mean" else 1
        words = torch.arange(len(weight), device=self.target.device)
        hit = (words == self.target.unsqueeze(-1)).double()
        wanted = (1.0 - smoothing) * hit + smoothing / max(1, len(weight))
        logits = x @ weight.t()
        size = x.abs() @ weight.abs().t()  # of each logit
        p = logits.softmax(-1)
        mean_size = (p * size).sum(-1, keepdim=True)
        losses = logits.logsumexp(-1).abs() + mean_size.squeeze(-1) + (wanted * size).sum(-1)
        row = (p * (1.0 + size + mean_size) + wanted) * used.unsqueeze(-1) / count
        grad = 1.0 if self.grad_loss is None else float(self.grad_loss.abs())
        return {
            "loss": (losses * used).sum() / count,
            "d_x": grad * (row @ weight.abs()),
            "d_weight": grad * (row.t() @ x.abs()),
        }


def cross_entropy_cases(
    dtype: torch.dtype, kinds: tuple[str, ...], *, quick: bool
) -> Iterator[NamedCase]:
    for name in KINDS:
        for shape in (QUICK_SHAPES if quick else SHAPES) if name in kinds else ():
            # the mean of no token is NaN
            if name == "sum" or shape[0] > (name == "ignored"):
                make = partial(_case, name, shape, dtype)
                yield NamedCase("linear_cross_entropy", name, shape, dtype, make)


def cross_entropy_case(kind: str, shape: tuple[int, int, int], draw: Draw) -> CrossEntropyCase:
    """The call of this kind at (tokens, columns, vocabulary)."""
    tokens, columns, vocabulary = shape
    options, ignored, factor = KINDS[kind]
    target = torch.randint(vocabulary, (tokens,), generator=draw.generator)
    target[draw.coins(ignored, tokens)] = options.get("ignore_index", -100)
    x = draw.normal(tokens, columns) * factor
    weight = draw.normal(vocabulary, columns)
    grad_loss = torch.tensor(-1.7, dtype=torch.promote_types(draw.dtype, torch.float32))
    return CrossEntropyCase(x, weight, target, options, grad_loss)


def _case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> TestCase:
    return cross_entropy_case(kind, shape, Draw(seed_of(kind), dtype))
