"""The tensors of a case: seeded, made once on its device, given to every candidate alike."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import Causal, Dense, KeyLengths, Mask, Window
from ...kernels.backends.reference import keep_threshold, philox4x32
from ...kernels.testing.oracle import AttentionCase
from ...kernels.testing.rows import RowCase
from .cases import DROPOUT_P, GROUP, WINDOW, Case
from .models import ModelInputs, model_inputs

EPS = 1e-5
SEED = 20170612
# The gate takes single heads where a batch element's scores are more than this: in float64, 1 GiB,
# of which the oracle holds nine at its peak.
MAX_SCORES = 2**27
NORM_ROWS, ALL_ELEMENTS = 64, 2**18  # rows of a norm that it looks at, unless it has few elements
ROWS = 3  # queries of every head that a recheck looks at
ALL_SCORES = 2**18  # of a case that is small enough to look at all of it

Outputs = tuple[Tensor, ...]
Index = tuple[slice, slice]  # of batch elements and of heads
Region = tuple[slice, ...]  # of every dimension of a tensor


class Part(NamedTuple):
    """The slices of a part of the inputs, and of the results that depend on it."""

    queries: Index
    keys: Index
    bias: Index

    def result_indices(self) -> tuple[Index, ...]:
        """Of out and of the gradients of q, k, v and the bias."""
        return self.queries, self.queries, self.keys, self.keys, self.bias


class Rows(NamedTuple):
    """Queries of a part of the inputs, of all heads and batch elements."""

    rows: Tensor

    def result_indices(self) -> tuple[Any, ...]:
        """Of out."""
        return ((slice(None), slice(None), self.rows),)


class NormRows(NamedTuple):
    """Rows of a norm, by the indices of them in each result; None where it is a sum over all."""

    indices: tuple[Any, ...]

    def result_indices(self) -> tuple[Any, ...]:
        return self.indices


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor  # (B, H, Lq, D)
    k: Tensor  # (B, Hkv, Lk, D)
    v: Tensor
    d_out: Tensor  # (B, H, Lq, D), the gradient that arrives at the output
    allowed: Tensor | None  # bool, broadcastable to (B, 1, Lq, Lk): True = may attend
    causal: bool  # a causal mask is all of `allowed`
    lengths: Tensor | None  # (B,) int64: how many keys are real
    mask: Mask | None  # the same in the words of rowmax.kernels
    dropout_p: float
    keep_mask: Tensor | None = None  # bool (B, H, Lq, Lk), True = dropout keeps, of a piece
    bias: Tensor | None = None  # (1, H, Lq, Lk), added to the scaled scores
    window: int | None = None  # keys before its own that a query attends, and none after it

    renewed = ("q", "k", "v", "d_out", "bias")  # whose values a measurement changes

    @property
    def leaves(self) -> Outputs:
        return (self.q, self.k, self.v, *(() if self.bias is None else (self.bias,)))

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def pairs(self) -> int:
        """(query, key) pairs that may attend."""
        batch, heads, queries, _ = self.q.shape
        keys = self.k.shape[2]
        if self.allowed is None:
            return batch * heads * queries * keys
        return heads * int(self.allowed.expand(batch, 1, queries, keys).sum())

    @property
    def bytes_to_move(self) -> int:
        """Bytes that any forward pass must read and write."""
        return self.q.nbytes + self.k.nbytes + self.v.nbytes + self.d_out.nbytes

    def to_copy(self) -> Tensor:
        """As much as it reads, for the rate of a copy."""
        return torch.cat((self.k.detach().flatten(), self.v.detach().flatten()))

    def pieces(self) -> Iterator[tuple[AttentionInputs, Part | None]]:
        """What the gate looks at: all where that is small, or else something of the first and of
        the last batch element.

        Batch elements and key heads do not depend on one another, and a float64 check of all of
        them would take longer than the measurement. Only a bias, whose gradient is summed over the
        batch, wants all of the batch; then it is the first and the last head.
        """
        batch, heads, queries_len, _ = self.q.shape
        key_heads, keys_len = self.k.shape[1:3]
        one_element = heads * queries_len * keys_len
        if batch * one_element <= min(MAX_SCORES, ALL_SCORES):
            part = self._part(slice(0, batch), slice(0, key_heads))
            yield self._cut(part), part
            return
        whole = one_element <= MAX_SCORES and self.bias is None
        for is_last in (False, True):
            b = slice(batch - 1, batch) if is_last else slice(0, 1)
            if self.bias is not None:
                b = slice(0, batch)
            one = slice(key_heads - 1, key_heads) if is_last else slice(0, 1)
            part = self._part(b, slice(0, key_heads) if whole else one)
            yield self._cut(part), part
            if (batch == 1 or self.bias is not None) and (key_heads == 1 or whole):
                return  # first and last are the same

    def some_piece(self, draw: Random) -> tuple[AttentionInputs, Part | None]:
        """A batch element and a key head, anyone's guess; with a bias, all of the batch; all where
        that is small, for of a few elements the naive path's error is a matter of luck.
        """
        batch, key_heads = self.q.shape[0], self.k.shape[1]
        if batch * self.q.shape[1] * self.q.shape[2] * self.k.shape[2] <= ALL_SCORES:
            return next(self.pieces())
        element, head = draw.randrange(batch), draw.randrange(key_heads)
        b = slice(element, element + 1) if self.bias is None else slice(0, batch)
        part = self._part(b, slice(head, head + 1))
        return self._cut(part), part

    def some_rows(self, draw: Random) -> tuple[AttentionInputs, Rows]:
        """A few queries of every head of every batch element: of their output, all is known."""
        length = self.q.shape[2]
        rows = torch.tensor(sorted(draw.sample(range(length), min(ROWS, length))))
        rows = rows.to(self.q.device)
        allowed, bias = self.allowed, self.bias
        if allowed is not None:
            allowed = allowed.expand(-1, -1, length, -1)[:, :, rows]
        piece = replace(
            self,
            q=self.q.detach()[:, :, rows].requires_grad_(),
            d_out=self.d_out[:, :, rows],
            allowed=allowed,
            bias=None if bias is None else bias.detach()[:, :, rows],
            causal=False,
            dropout_p=0.0,
        )
        return piece, Rows(rows)

    def regions(self, part: Part | None) -> dict[str, Region]:
        """Of each tensor, the elements that any mask of a case lets reach the results of `part`."""
        every, half = slice(None), slice(0, (self.k.shape[2] + 1) // 2)
        whole = every, every
        queries, keys = (whole, whole) if part is None else (part.queries, part.keys)
        return {"q": (*queries, every, every), **dict.fromkeys(("k", "v"), (*keys, half, every))}

    def _part(self, batch: slice, key_heads: slice) -> Part:
        """These batch elements and key heads, with the query heads that share those."""
        queries = slice(key_heads.start * self.group, key_heads.stop * self.group)
        return Part((batch, queries), (batch, key_heads), (slice(0, 1), queries))

    def _cut(self, part: Part) -> AttentionInputs:
        allowed, bias = self.allowed, self.bias
        if allowed is not None and allowed.shape[0] > 1:
            allowed = allowed[part.queries[0]]
        return replace(
            self,
            q=self.q[part.queries].detach().requires_grad_(),
            k=self.k[part.keys].detach().requires_grad_(),
            v=self.v[part.keys].detach().requires_grad_(),
            d_out=self.d_out[part.queries],
            allowed=allowed,
            bias=None if bias is None else bias[part.bias].detach().requires_grad_(),
            keep_mask=None if self.keep_mask is None else self.keep_mask[part.queries],
        )

    def split(self) -> list[AttentionInputs]:
        """Query heads that share a key head, one by one: together their scores may not fit."""
        if self.group == 1:
            return [self]
        every = slice(0, self.q.shape[0])
        parts = []
        for head in range(self.q.shape[1]):
            queries = slice(head, head + 1)
            keys = slice(head // self.group, head // self.group + 1)
            parts.append(self._cut(Part((every, queries), (every, keys), (slice(0, 1), queries))))
        return parts

    def join(self, results: Sequence[Outputs]) -> Outputs:
        """The results for `self` from those for its `split()`."""
        joined = [torch.cat(parts, dim=1) for parts in zip(*results, strict=True)]
        for index in range(2, min(4, len(joined))):  # gradients of k and v
            joined[index] = joined[index].unflatten(1, (-1, self.group)).sum(2)
        return tuple(joined)

    def with_keep_mask(self, part: Part) -> AttentionInputs:
        """Of heads that are not the first, whose weights the seed alone would not tell."""
        if self.dropout_p == 0.0:
            return self
        lengths = (self.q.shape[2], self.k.shape[2])
        return replace(
            self, keep_mask=_keep_mask(part.queries, lengths, self.dropout_p, self.q.device)
        )

    def test_case(self, *, backward: bool) -> AttentionCase:
        dropout = {"dropout_p": self.dropout_p, "seed": SEED} if self.dropout_p > 0.0 else {}
        return AttentionCase(
            *(self.q, self.k, self.v, self.allowed, self.bias),
            options=dropout,
            grad_out=self.d_out if backward else None,
            with_lse=False,
            kept=self.keep_mask,
        )


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

    renewed = ("x", "residual", "weight", "bias", "d_out")

    @property
    def leaves(self) -> Outputs:
        candidates = (self.x, self.residual, self.weight, self.bias)
        return tuple(tensor for tensor in candidates if tensor is not None)

    def to_copy(self) -> Tensor:
        return self.x.detach()

    def pieces(self) -> Iterator[tuple[NormInputs, Part | None]]:
        """All rows at once: the gradient of the weight needs every one."""
        yield self, None

    def some_piece(self, draw: Random) -> tuple[NormInputs, NormRows | None]:
        """Some rows, without the gradients that are sums over all of them; all where that is not
        much, or where dropout goes by the row's number.
        """
        if self.x.numel() <= ALL_ELEMENTS or self.dropout_p > 0.0:
            return self, None
        axis = self.x.dim() - 2
        length = self.x.shape[axis]
        drawn = sorted(draw.sample(range(length), min(NORM_ROWS, length)))
        rows = torch.tensor(drawn, device=self.x.device)

        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach().index_select(axis, rows)

        residual = None if self.residual is None else cut(self.residual).requires_grad_()
        x, d_out = cut(self.x).requires_grad_(), cut(self.d_out)
        at = (*(slice(None),) * axis, rows)
        sums = tuple(None for sum_over in (self.weight, self.bias) if sum_over is not None)
        by_row = 2 if residual is None else 4  # out and d_x, or those and sum and d_residual
        piece = replace(self, x=x, residual=residual, d_out=d_out)
        return piece, NormRows((*(at,) * by_row, *sums))

    def regions(self, part: NormRows | None) -> dict[str, Region]:
        half = slice(0, (self.x.shape[-1] + 1) // 2)  # what is padded lies behind it
        whole = (slice(None),) * self.x.dim()
        if part is None:
            return {"x": (*whole[:-1], half)}
        row = int(part.indices[0][-1][0])
        return {"x": (*whole[:-2], slice(row, row + 1), half)}

    def split(self) -> list[NormInputs]:
        return [self]

    def join(self, results: Sequence[Outputs]) -> Outputs:
        return results[0]

    def test_case(self, kind: str, *, backward: bool) -> RowCase:
        grads = (self.d_out,) if backward else ()
        if kind == "masked_softmax":
            return RowCase(kind, {"scores": self.x}, grads, self.mask)
        parameters = {"residual": self.residual, "weight": self.weight, "bias": self.bias}
        options: dict[str, Any] = {"eps": EPS}
        if self.dropout_p > 0.0:
            options |= {"dropout_p": self.dropout_p, "seed": SEED}
        tensors = {"x": self.x}
        tensors |= {name: tensor for name, tensor in parameters.items() if tensor is not None}
        return RowCase(kind, tensors, grads, options=options)


Inputs = AttentionInputs | NormInputs | ModelInputs


def make_inputs(case: Case) -> Inputs:
    if case.suite.model:
        return model_inputs(case)
    draw = _Draw(case)
    return _attention_inputs(case, draw) if case.suite.attention else _norm_inputs(case, draw)


def to_float64(inputs: Any) -> Any:
    """The same inputs with every floating-point tensor in float64, and fresh leaves."""
    changed: dict[str, Any] = {}
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            changed[name] = _wide(value)
        elif name == "weights":
            changed[name] = tuple(map(_wide, value))
    return replace(inputs, **changed)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


class _Draw:
    """Random tensors of a case's device and dtype, the same every time."""

    def __init__(self, case: Case) -> None:
        self.device = torch.device(case.suite.device)
        self.dtype = case.dtype
        self.generator = torch.Generator(self.device).manual_seed(SEED)

    def normal(self, *size: int) -> Tensor:
        tensor = torch.randn(size, generator=self.generator, device=self.device)
        return tensor.to(self.dtype)

    def coins(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, device=self.device) < 0.5

    def padding(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Lengths uniform in [length / 2, length], and the bool mask (batch, 1, 1, length)."""
        lengths = torch.randint(
            *((length + 1) // 2, length + 1, (batch,)), generator=self.generator, device=self.device
        )
        real = torch.arange(length, device=self.device) < lengths[:, None]
        return lengths, real[:, None, None, :]


def _attention_inputs(case: Case, draw: _Draw) -> AttentionInputs:
    parts = case.parts
    batch, heads, key_heads, queries, keys, size = case.sizes
    if "gqa" in parts:
        key_heads = heads // GROUP
    q, k, v, d_out = (
        draw.normal(batch, some_heads, length, size)
        if case.layout == "bhld"
        else draw.normal(batch, length, some_heads, size).transpose(1, 2)
        for some_heads, length in (
            *((heads, queries), (key_heads, keys), (key_heads, keys)),
            (heads, queries),
        )
    )
    masks: list[Mask] = []
    allowances: list[Tensor] = []
    lengths = bias = None
    causal = bool(parts & {"causal", "gqa"})
    if causal or "window" in parts:
        lower = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device).tril()
        allowances.append(lower.triu(-WINDOW) if "window" in parts else lower)
        masks.append(Window(WINDOW, 0) if "window" in parts else Causal())
    if "padded" in parts:
        lengths, real = draw.padding(batch, keys)
        allowances.append(real)
        masks.append(KeyLengths(lengths))
    if "dense" in parts:
        # with its own position, so that torch's paths, too, have a key for every query
        coins = draw.coins(queries, keys).fill_diagonal_(True).view(1, 1, queries, keys)
        allowances.append(coins)
        masks.append(Dense(coins))
    if "bias" in parts:
        bias = draw.normal(1, heads, queries, keys).requires_grad_()
    return AttentionInputs(
        q.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        d_out,
        functools.reduce(torch.logical_and, allowances) if allowances else None,
        causal and len(masks) == 1,
        lengths,
        functools.reduce(lambda left, right: left & right, masks) if masks else None,
        DROPOUT_P if "dropout" in parts else 0.0,
        bias=bias,
        window=WINDOW if "window" in parts else None,
    )


def _norm_inputs(case: Case, draw: _Draw) -> NormInputs:
    rows, columns = case.shape

    def leaf(*size: int) -> Tensor:
        return draw.normal(*size).requires_grad_()

    if case.kind == "masked_softmax":
        batch = 8 if rows % 8 == 0 else 1
        lengths, allowed = draw.padding(batch, columns)
        scores = leaf(batch, 1, rows // batch, columns)
        d_weights = draw.normal(*scores.shape)
        return NormInputs(
            scores, None, None, None, d_weights, allowed, KeyLengths(lengths), dropout_p=0.0
        )
    adds = case.kind == "add_layer_norm"
    return NormInputs(
        x=leaf(rows, columns),
        residual=leaf(rows, columns) if adds else None,
        weight=leaf(columns),
        bias=None if case.kind == "rms_norm" else leaf(columns),
        d_out=draw.normal(rows, columns),
        allowed=None,
        mask=None,
        dropout_p=DROPOUT_P if adds else 0.0,
    )


def _keep_mask(
    queries: Index, lengths: tuple[int, int], dropout_p: float, device: torch.device
) -> Tensor:
    """bool (batch elements, heads, Lq, Lk): True where SEED keeps the weight.

    As `attention_keep`, but of some heads only: the random words of all would not fit.
    """
    b, h = (torch.arange(part.start, part.stop, device=device) for part in queries)
    row = torch.arange(lengths[0], device=device).view(-1, 1)
    four_keys = torch.arange((lengths[1] + 3) // 4, device=device)
    counter = (four_keys, row, h.view(-1, 1, 1), b.view(-1, 1, 1, 1))
    words = philox4x32(counter, torch.tensor(SEED, device=device))
    kept = [word >= keep_threshold(dropout_p) for word in torch.broadcast_tensors(*words)]
    return torch.stack(kept, dim=-1).flatten(-2)[..., : lengths[1]]
