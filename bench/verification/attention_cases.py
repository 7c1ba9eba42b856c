"""The attention cases: every kind of mask, bias and option at every shape that suits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import (
    ALiBi,
    Causal,
    Dense,
    Documents,
    KeyLengths,
    Mask,
    QueryLengths,
    Window,
)
from ...kernels.testing.oracle import Arguments, random_gradients
from .questions import AttentionQuestion, Case, PackedQuestion, Question


class Sizes(NamedTuple):
    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    D: int
    Dv: int

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.B, self.Hq, self.Lq, self.Lk

    @property
    def square(self) -> bool:
        return self.Lq == self.Lk


class Draw:
    """Seeded tensors."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *size: int) -> Tensor:
        wide = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return wide.to(self.dtype)

    def coins(self, share: float, *size: int) -> Tensor:
        """bool, True with probability `share`."""
        return torch.rand(size, generator=self.generator) < share

    def lengths(self, most: int, count: int) -> Tensor:
        """(count,) ints in [0, most]; the first is `most`, the second 0, as far as there are."""
        drawn = torch.randint(most + 1, (count,), generator=self.generator)
        for at, value in enumerate((most, 0)[:count]):
            drawn[at] = value
        return drawn


MakeMask = Callable[[Sizes, Draw], Mask | Tensor]
MakeBias = Callable[[Sizes, Draw], Tensor | ALiBi]


@dataclass(frozen=True)
class Kind:
    """What is special about a call."""

    mask: MakeMask | None = None
    bias: MakeBias | None = None
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    suits: Callable[[Sizes], bool] = lambda sizes: True


def _causal(sizes: Sizes, draw: Draw) -> Mask:
    return Causal() if sizes.square else Causal("lower_right")


def _window(sizes: Sizes, draw: Draw) -> Mask:
    return Window(5, 2, None if sizes.square else "lower_right")


def _key_lengths(sizes: Sizes, draw: Draw) -> Mask:
    return KeyLengths(draw.lengths(sizes.Lk, sizes.B))


def _query_lengths(sizes: Sizes, draw: Draw) -> Mask:
    return QueryLengths(draw.lengths(sizes.Lq, sizes.B))


def _ids(length: int, sizes: Sizes, draw: Draw) -> Tensor:
    drawn = torch.randint(3, (sizes.B, length), generator=draw.generator)
    return drawn.sort(dim=1).values


def _documents(sizes: Sizes, draw: Draw) -> Mask:
    ids = _ids(sizes.Lq, sizes, draw)
    return Documents(ids) if sizes.square else Documents(ids, _ids(sizes.Lk, sizes, draw))


def _dense(share: float, full: tuple[bool, ...]) -> MakeMask:
    def make(sizes: Sizes, draw: Draw) -> Tensor:
        return draw.coins(share, *_broadcast(sizes, full))

    return make


def _joined(sizes: Sizes, draw: Draw) -> Mask:
    return (
        _causal(sizes, draw)
        & Window(max(1, sizes.Lk // 2), None, "lower_right")
        & _key_lengths(sizes, draw)
        & QueryLengths(draw.lengths(sizes.Lq, sizes.B).flip(0))
        & Dense(draw.coins(0.8, 1, sizes.Hq, sizes.Lq, sizes.Lk))
    )


def _bias(*full: bool) -> MakeBias:
    def make(sizes: Sizes, draw: Draw) -> Tensor:
        return draw.normal(*_broadcast(sizes, full))

    return make


def _bias_with_infinities(sizes: Sizes, draw: Draw) -> Tensor:
    masked = ~draw.coins(0.7, 1, sizes.Hq, sizes.Lq, sizes.Lk)
    return draw.normal(1, sizes.Hq, sizes.Lq, sizes.Lk).masked_fill(masked, -torch.inf)


def _alibi(sizes: Sizes, draw: Draw) -> ALiBi:
    return ALiBi(draw.normal(sizes.Hq).abs(), None if sizes.square else "lower_right")


def _broadcast(sizes: Sizes, full: tuple[bool, ...]) -> list[int]:
    return [size if is_full else 1 for size, is_full in zip(sizes.scores, full, strict=True)]


_FULL = (True, True, True, True)
_A_HEAD = (False, True, True, True)
_HALF_DROPS = {"dropout_p": 0.5, "seed": -1}

KINDS: dict[str, Kind] = {
    "none": Kind(),
    "causal": Kind(_causal),
    "causal-upper-left": Kind(lambda s, d: Causal("upper_left"), suits=lambda s: not s.square),
    "window": Kind(_window),
    "key-lengths": Kind(_key_lengths),
    "query-lengths": Kind(_query_lengths),
    "documents": Kind(_documents),
    "dense": Kind(_dense(0.75, _FULL)),
    "dense-shared": Kind(_dense(0.5, (False, False, True, True))),
    "dense-sparse": Kind(_dense(0.05, _FULL)),
    "joined": Kind(_joined),
    "bias": Kind(bias=_bias(*_A_HEAD)),
    "bias-of-keys": Kind(bias=_bias(True, False, False, True)),
    "bias-infinities": Kind(bias=_bias_with_infinities),
    "bias-causal": Kind(_causal, _bias(*_FULL)),
    "alibi": Kind(bias=_alibi),
    "softcap": Kind(_causal, options={"softcap": 1.5}),
    "sinks": Kind(_key_lengths, sinks=True),
    "scale": Kind(options={"scale": -0.6}),
    "dropout": Kind(options=_HALF_DROPS),
    "dropout-causal": Kind(_causal, options={"dropout_p": 0.1, "seed": 2**40 + 3}),
    "everything": Kind(
        _joined,
        _bias(*_A_HEAD),
        sinks=True,
        options={"softcap": 2.0, "dropout_p": 0.2, "seed": 9, "scale": 0.3},
    ),
}

# Why each is there:
QUICK_SHAPES = (
    Sizes(3, 2, 2, 19, 19, 7, 7),  # nothing is a multiple of anything
    Sizes(2, 6, 2, 33, 33, 16, 16),  # grouped heads; one past a tile's edge
    Sizes(2, 2, 2, 21, 70, 16, 24),  # more keys than queries; Dv != D
    Sizes(2, 4, 2, 2, 300, 24, 24),  # decoding: few queries over many keys
)
SHAPES = (
    *QUICK_SHAPES,
    Sizes(1, 2, 2, 65, 65, 64, 64),  # the usual head size
    Sizes(2, 2, 2, 70, 13, 40, 40),  # more queries than keys
    Sizes(3, 6, 1, 1, 270, 16, 16),  # one key head for all
    Sizes(1, 1, 1, 20, 70, 256, 256),  # the largest usual head size
    Sizes(1, 2, 2, 130, 130, 128, 128),
    Sizes(1, 1, 1, 300, 277, 16, 16),  # several tiles each way
)
EMPTY_SHAPES = (Sizes(0, 2, 2, 5, 5, 8, 8), Sizes(2, 2, 2, 0, 5, 8, 8), Sizes(2, 2, 2, 5, 0, 8, 8))
PACKED_KINDS = ("none", "causal", "window", "alibi", "sinks", "dropout", "softcap")
PACKED_SHAPES = (Sizes(4, 4, 2, 40, 40, 16, 16), Sizes(3, 2, 2, 20, 70, 24, 8))


def attention_cases(
    dtype: torch.dtype, shapes: tuple[Sizes, ...], kinds: tuple[str, ...], *, empty: bool = True
) -> Iterator[Case]:
    """Of the kinds named, at the shapes that suit them; with `empty`, at those of no elements."""
    for name in kinds:
        for sizes in shapes:
            if KINDS[name].suits(sizes):
                make = partial(_question, name, sizes, dtype)
                yield Case("attention", name, tuple(sizes), dtype, make)
    for sizes in EMPTY_SHAPES if empty and "none" in kinds else ():
        make = partial(_question, "none", sizes, dtype)
        yield Case("attention", "empty", tuple(sizes), dtype, make)


def packed_cases(
    dtype: torch.dtype, shapes: tuple[Sizes, ...], kinds: tuple[str, ...]
) -> Iterator[Case]:
    for name in PACKED_KINDS:
        for sizes in shapes if name in kinds else ():
            make = partial(_packed_question, name, sizes, dtype)
            yield Case("attention_varlen", name, tuple(sizes), dtype, make)


def attention_arguments(
    kind: Kind, sizes: Sizes, draw: Draw, *, with_lse: bool = True
) -> Arguments:
    """The call of this kind at this shape, with random gradients."""
    arguments = Arguments(
        q=draw.normal(sizes.B, sizes.Hq, sizes.Lq, sizes.D),
        k=draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.D),
        v=draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.Dv),
        mask=None if kind.mask is None else kind.mask(sizes, draw),
        bias=None if kind.bias is None else kind.bias(sizes, draw),
        sinks=draw.normal(sizes.Hq) if kind.sinks else None,
        options=kind.options,
    )
    return random_gradients(arguments, draw.generator, with_lse=with_lse)


def _question(name: str, sizes: Sizes, dtype: torch.dtype, with_lse: bool) -> Question:
    draw = Draw(_seed(name), dtype)
    return AttentionQuestion(attention_arguments(KINDS[name], sizes, draw, with_lse=with_lse))


def _packed_question(name: str, sizes: Sizes, dtype: torch.dtype, with_lse: bool) -> Question:
    kind = KINDS[name]
    if name == "sinks":  # whose mask of lengths is what packing is instead of
        kind = Kind(sinks=True)
    draw = Draw(_seed(name), dtype)
    queries = draw.lengths(sizes.Lq, sizes.B)
    keys = queries if sizes.square else draw.lengths(sizes.Lk, sizes.B)
    if not sizes.square and kind.mask is not None:
        kind = Kind(_aligned_left(name), kind.bias, kind.sinks, kind.options)
    if not sizes.square and kind.bias is _alibi:
        kind = Kind(bias=lambda s, d: ALiBi(d.normal(s.Hq).abs(), "upper_left"))
    arguments = attention_arguments(kind, sizes, draw)
    lengths = KeyLengths(keys) & QueryLengths(queries)
    mask = arguments.mask
    padded = lengths & mask if isinstance(mask, Mask) else lengths
    # rows beyond a sequence's end are no rows at all when packed
    real = torch.arange(sizes.Lq) < queries.view(-1, 1, 1)
    grad_lse = arguments.grad_lse
    assert arguments.grad_out is not None  # attention_arguments draws it
    assert grad_lse is not None
    given = Arguments(
        *(arguments.q, arguments.k, arguments.v, padded, arguments.bias, arguments.sinks),
        arguments.options,
        arguments.grad_out.masked_fill(~real.unsqueeze(-1), 0.0),
        grad_lse.masked_fill(~real, 0.0),
    )
    return PackedQuestion(arguments, given, (queries, keys))


def _aligned_left(name: str) -> MakeMask:
    """Positions counted from each sequence's start: padding does not move them."""
    if name == "window":
        return lambda s, d: Window(5, 2, "upper_left")
    return lambda s, d: Causal("upper_left")


def _seed(name: str) -> int:
    return sum(map(ord, name))
