"""The tensors of a case: seeded, made once, given to every candidate alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import Causal, KeyLengths, Mask
from ..kernels.reference import attention_keep, rows_keep
from .cases import DROPOUT_P, Case

EPS = 1e-5
SEED = 20170612

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor  # (B, H, L, D)
    k: Tensor
    v: Tensor
    d_out: Tensor  # (B, H, L, D), the gradient that arrives at the output
    allowed: Tensor | None  # bool, broadcastable to (B, H, L, L): True = may attend
    causal: bool
    lengths: Tensor | None  # (B,) int64: how many keys are real
    mask: Mask | None  # the same in the words of rowmax.kernels
    dropout_p: float
    keep: Tensor | None = None  # what the gate multiplies the weights by, in place of dropout

    @property
    def leaves(self) -> Outputs:
        return self.q, self.k, self.v

    @property
    def pairs(self) -> int:
        """(query, key) pairs that may attend."""
        batch, heads, length, _ = self.q.shape
        full = (batch, 1, length, length)
        if self.allowed is None:
            return batch * heads * length * length
        return heads * int(self.allowed.expand(full).sum())

    def pieces(self) -> Iterator[tuple[AttentionInputs, slice | None]]:
        """The first and the last batch element: what the gate looks at.

        Batch elements do not depend on one another, and a float64 check of all of them would
        take longer than the measurement.
        """
        for batch in sorted({0, self.q.shape[0] - 1}):
            part = slice(batch, batch + 1)
            allowed = self.allowed
            if allowed is not None and allowed.shape[0] > 1:
                allowed = allowed[part]
            q, k, v = (leaf[part].detach().requires_grad_() for leaf in self.leaves)
            yield replace(self, q=q, k=k, v=v, d_out=self.d_out[part], allowed=allowed), part

    def with_keep(self, part: slice | None) -> AttentionInputs:
        """Dropout made explicit, as `seed=SEED` makes rowmax.kernels drop weights."""
        if self.dropout_p == 0.0:
            return self
        shape = (*self.q.shape[:3], self.k.shape[2])
        start = part.start if part is not None else 0
        kept = attention_keep(torch.tensor(SEED), self.dropout_p, shape, start)
        return replace(self, dropout_p=0.0, keep=kept.to(self.q.dtype) / (1 - self.dropout_p))


@dataclass(frozen=True)
class NormInputs:
    x: Tensor  # (rows, columns), or scores (batch, 1, rows / batch, columns)
    residual: Tensor | None
    weight: Tensor | None  # (columns,)
    bias: Tensor | None
    d_out: Tensor  # like x
    allowed: Tensor | None  # bool (batch, 1, 1, columns), for scores
    mask: Mask | None
    dropout_p: float
    keep: Tensor | None = None

    @property
    def leaves(self) -> Outputs:
        candidates = (self.x, self.residual, self.weight, self.bias)
        return tuple(tensor for tensor in candidates if tensor is not None)

    def pieces(self) -> Iterator[tuple[NormInputs, slice | None]]:
        """All rows at once: the gradient of the weight needs every one."""
        yield self, None

    def with_keep(self, part: slice | None) -> NormInputs:  # noqa: ARG002 (one shape of method)
        if self.dropout_p == 0.0:
            return self
        kept = rows_keep(torch.tensor(SEED), self.dropout_p, *self.x.shape)
        return replace(self, dropout_p=0.0, keep=kept.to(self.x.dtype) / (1 - self.dropout_p))


Inputs = AttentionInputs | NormInputs


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)
    if case.suite == "cpu-attention":
        return _attention_inputs(case, dtype, generator)
    return _norm_inputs(case, dtype, generator)


def to_float64(inputs: Any) -> Any:
    """The same inputs with every floating-point tensor in float64, and fresh leaves."""
    changed = {}
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            changed[name] = value.detach().double().requires_grad_(value.requires_grad)
    return replace(inputs, **changed)


def _attention_inputs(
    case: Case, dtype: torch.dtype, generator: torch.Generator
) -> AttentionInputs:
    batch, _, length, _ = case.shape
    q, k, v, d_out = (torch.randn(case.shape, generator=generator).to(dtype) for _ in range(4))
    allowed = lengths = None
    mask: Mask | None = None
    if case.kind == "causal":
        allowed = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        mask = Causal()
    elif case.kind == "padded":
        lengths, allowed = _padding(batch, length, generator)
        mask = KeyLengths(lengths)
    return AttentionInputs(
        q.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        d_out,
        allowed,
        case.kind == "causal",
        lengths,
        mask,
        DROPOUT_P if case.kind == "dropout" else 0.0,
    )


def _norm_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> NormInputs:
    rows, columns = case.shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    if case.kind == "masked_softmax":
        batch = 8 if rows % 8 == 0 else 1
        lengths, allowed = _padding(batch, columns, generator)
        scores = draw(batch, 1, rows // batch, columns)
        d_weights = draw(*scores.shape).detach()
        return NormInputs(
            scores, None, None, None, d_weights, allowed, KeyLengths(lengths), dropout_p=0.0
        )
    adds = case.kind == "add_layer_norm"
    return NormInputs(
        x=draw(rows, columns),
        residual=draw(rows, columns) if adds else None,
        weight=draw(columns),
        bias=None if case.kind == "rms_norm" else draw(columns),
        d_out=draw(rows, columns).detach(),
        allowed=None,
        mask=None,
        dropout_p=DROPOUT_P if adds else 0.0,
    )


def _padding(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lengths uniform in [length / 2, length], and the bool mask (batch, 1, 1, length)."""
    lengths = torch.randint((length + 1) // 2, length + 1, (batch,), generator=generator)
    return lengths, (torch.arange(length) < lengths[:, None])[:, None, None, :]
