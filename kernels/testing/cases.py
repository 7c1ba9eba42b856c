"""The named cases of attention: kinds of mask, bias and option at every shape that suits each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api.biases import ALiBi
from ..api.masks import Causal, Dense, Documents, KeyLengths, Mask, QueryLengths, Window
from .oracle import AttentionCase, PackedCase, TestCase, random_gradients

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    B: int = 2
    Hq: int = 2
    Hkv: int = 2
    Lq: int = 17
    Lk: int = 17
    D: int = 8
    Dv: int = 8

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.B, self.Hq, self.Lq, self.Lk

    @property
    def square(self) -> bool:
        return self.Lq == self.Lk


class Draw:
    """Seeded tensors, the same in every dtype but for rounding."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.device = device  # of `normal`; masks are made on the CPU

    def normal(self, *size: int) -> Tensor:
        wide = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return wide.to(self.device, self.dtype)

    def coins(self, share: float, *size: int) -> Tensor:
        """bool, True with probability `share`."""
        return torch.rand(size, generator=self.generator) < share

    def lengths(self, maximum: int, count: int) -> Tensor:
        """(count,) ints in [0, maximum], of which the first is `maximum` and the second 0."""
        drawn = torch.randint(maximum + 1, (count,), generator=self.generator)
        for at, value in enumerate((maximum, 0)[:count]):
            drawn[at] = value
        return drawn


@dataclass(frozen=True)
class NamedCase:
    """A test case by its name; its tensors are made, and the oracle runs, when they are needed."""

    op: str  # the function of rowmax.kernels that it is a call of
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], TestCase]

    def case(self, *, with_lse: bool = True, backward: bool = True) -> TestCase:
        """The same object each time, until `forget`."""
        chosen = with_lse, backward
        if chosen not in self._made:
            case = self.make()
            if not with_lse and isinstance(case, AttentionCase | PackedCase):
                case = case.without_lse()
            self._made[chosen] = case if backward else case.forward_only()
        return self._made[chosen]

    @cached_property
    def _made(self) -> dict[tuple[bool, bool], TestCase]:
        return {}

    def forget(self) -> None:
        """Gives back the memory of the tensors and of what the oracle found."""
        self._made.clear()

    def __str__(self) -> str:
        sizes = ",".join(map(str, self.shape))
        return f"{self.op} {self.kind} ({sizes}) {dtype_text(self.dtype)}"


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


MakeMask = Callable[[Shape, Draw], Mask | Tensor]
MakeBias = Callable[[Shape, Draw], Tensor | ALiBi]


@dataclass(frozen=True)
class Kind:
    """The mask, bias and options of a call."""

    mask: MakeMask | None = None
    bias: MakeBias | None = None
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    suits: Callable[[Shape], bool] = lambda sizes: True


def _causal(sizes: Shape, draw: Draw) -> Mask:
    return Causal() if sizes.square else Causal("lower_right")


def _causal_prefix(sizes: Shape, draw: Draw) -> Mask:
    prefix = torch.randint(sizes.Lk + 1, (sizes.B,), generator=draw.generator)
    return Causal(None if sizes.square else "lower_right", prefix)


def _window(sizes: Shape, draw: Draw) -> Mask:
    return Window(5, 2, None if sizes.square else "lower_right")


def _key_lengths(sizes: Shape, draw: Draw) -> Mask:
    return KeyLengths(draw.lengths(sizes.Lk, sizes.B))


def _query_lengths(sizes: Shape, draw: Draw) -> Mask:
    return QueryLengths(draw.lengths(sizes.Lq, sizes.B))


def _ids(length: int, sizes: Shape, draw: Draw) -> Tensor:
    drawn = torch.randint(3, (sizes.B, length), generator=draw.generator)
    return drawn.sort(dim=1).values


def _documents(sizes: Shape, draw: Draw) -> Mask:
    ids = _ids(sizes.Lq, sizes, draw)
    return Documents(ids) if sizes.square else Documents(ids, _ids(sizes.Lk, sizes, draw))


def _dense(share: float, full: tuple[bool, ...]) -> MakeMask:
    def make(sizes: Shape, draw: Draw) -> Tensor:
        return draw.coins(share, *_broadcast(sizes, full))

    return make


def _joined(sizes: Shape, draw: Draw) -> Mask:
    return (
        _causal(sizes, draw)
        & Window(max(1, sizes.Lk // 2), None, "lower_right")
        & _key_lengths(sizes, draw)
        & QueryLengths(draw.lengths(sizes.Lq, sizes.B).flip(0))
        & Dense(draw.coins(0.8, 1, sizes.Hq, sizes.Lq, sizes.Lk))
    )


def _bias(*full: bool) -> MakeBias:
    def make(sizes: Shape, draw: Draw) -> Tensor:
        return draw.normal(*_broadcast(sizes, full))

    return make


def _bias_with_infinities(sizes: Shape, draw: Draw) -> Tensor:
    masked = ~draw.coins(0.7, 1, sizes.Hq, sizes.Lq, sizes.Lk)
    return draw.normal(1, sizes.Hq, sizes.Lq, sizes.Lk).masked_fill(masked, -torch.inf)


def _alibi(sizes: Shape, draw: Draw) -> ALiBi:
    return ALiBi(draw.normal(sizes.Hq).abs(), None if sizes.square else "lower_right")


def _broadcast(sizes: Shape, full: tuple[bool, ...]) -> list[int]:
    return [size if is_full else 1 for size, is_full in zip(sizes.scores, full, strict=True)]


_FULL = (True, True, True, True)
_A_HEAD = (False, True, True, True)
_HALF_DROPS = {"dropout_p": 0.5, "seed": -1}

KINDS: dict[str, Kind] = {
    "none": Kind(),
    "causal": Kind(_causal),
    "causal-upper-left": Kind(lambda s, d: Causal("upper_left"), suits=lambda s: not s.square),
    "causal-prefix": Kind(_causal_prefix),
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
    Shape(3, 2, 2, 19, 19, 7, 7),  # nothing is a multiple of anything
    Shape(2, 6, 2, 33, 33, 16, 16),  # grouped heads; one past a tile's edge
    Shape(2, 2, 2, 21, 70, 16, 24),  # more keys than queries; Dv != D
    Shape(2, 4, 2, 2, 300, 24, 24),  # decoding: few queries over many keys
)
SHAPES = (
    *QUICK_SHAPES,
    Shape(1, 2, 2, 65, 65, 64, 64),  # the usual head size
    Shape(2, 2, 2, 70, 13, 40, 40),  # more queries than keys
    Shape(3, 6, 1, 1, 270, 16, 16),  # one key head for all
    Shape(1, 1, 1, 20, 70, 256, 256),  # the largest usual head size
    Shape(1, 2, 2, 130, 130, 128, 128),
    Shape(1, 1, 1, 300, 277, 16, 16),  # several tiles each way
)
EMPTY_SHAPES = (Shape(0, 2, 2, 5, 5, 8, 8), Shape(2, 2, 2, 0, 5, 8, 8), Shape(2, 2, 2, 5, 0, 8, 8))
PACKED_KINDS = ("none", "causal", "causal-prefix", "window", "alibi", "sinks", "dropout", "softcap")
PACKED_SHAPES = (Shape(4, 4, 2, 40, 40, 16, 16), Shape(3, 2, 2, 20, 70, 24, 8))


def attention_cases(
    dtype: torch.dtype, shapes: tuple[Shape, ...], kinds: tuple[str, ...], *, empty: bool = True
) -> Iterator[NamedCase]:
    """Of the kinds named, at the shapes that suit them; with `empty`, at those of no elements."""
    for name in kinds:
        for sizes in shapes:
            if KINDS[name].suits(sizes):
                make = partial(_named_case, name, sizes, dtype)
                yield NamedCase("attention", name, tuple(sizes), dtype, make)
    for sizes in EMPTY_SHAPES if empty and "none" in kinds else ():
        make = partial(_named_case, "none", sizes, dtype)
        yield NamedCase("attention", "empty", tuple(sizes), dtype, make)


def packed_cases(
    dtype: torch.dtype, shapes: tuple[Shape, ...], kinds: tuple[str, ...]
) -> Iterator[NamedCase]:
    for name in PACKED_KINDS:
        for sizes in shapes if name in kinds else ():
            make = partial(_packed_case, name, sizes, dtype)
            yield NamedCase("attention_varlen", name, tuple(sizes), dtype, make)


def attention_case(kind: Kind, sizes: Shape, draw: Draw) -> AttentionCase:
    """The call of this kind at this shape, with random gradients."""
    case = AttentionCase(
        q=draw.normal(sizes.B, sizes.Hq, sizes.Lq, sizes.D),
        k=draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.D),
        v=draw.normal(sizes.B, sizes.Hkv, sizes.Lk, sizes.Dv),
        mask=None if kind.mask is None else kind.mask(sizes, draw),
        bias=None if kind.bias is None else kind.bias(sizes, draw),
        sinks=draw.normal(sizes.Hq) if kind.sinks else None,
        options=kind.options,
    )
    return random_gradients(case, draw.generator)


def packed_case(case: AttentionCase, queries: Tensor, keys: Tensor) -> PackedCase:
    """Sequences of these lengths, each (B,), packed; `case` has them padded, and no such masks."""
    lengths = KeyLengths(keys) & QueryLengths(queries)
    # rows beyond a sequence's end are no rows at all when packed
    padding = torch.arange(case.q.shape[2]) >= queries.view(-1, 1, 1)
    assert case.grad_out is not None  # random_gradients draws both
    assert case.grad_lse is not None
    padded = replace(
        case,
        mask=lengths & case.mask if isinstance(case.mask, Mask) else lengths,
        grad_out=case.grad_out.masked_fill(padding.unsqueeze(-1), 0.0),
        grad_lse=case.grad_lse.masked_fill(padding, 0.0),
    )
    return PackedCase(case, padded, (queries, keys))


def _named_case(name: str, sizes: Shape, dtype: torch.dtype) -> TestCase:
    return attention_case(KINDS[name], sizes, Draw(seed_of(name), dtype))


def _packed_case(name: str, sizes: Shape, dtype: torch.dtype) -> TestCase:
    kind = KINDS[name]
    if name == "sinks":  # whose mask of lengths is what packing is instead of
        kind = Kind(sinks=True)
    draw = Draw(seed_of(name), dtype)
    queries = draw.lengths(sizes.Lq, sizes.B)
    keys = queries if sizes.square else draw.lengths(sizes.Lk, sizes.B)
    if not sizes.square and kind.mask is not None:
        kind = Kind(_aligned_left(name), kind.bias, kind.sinks, kind.options)
    if not sizes.square and kind.bias is _alibi:
        kind = Kind(bias=lambda s, d: ALiBi(d.normal(s.Hq).abs(), "upper_left"))
    return packed_case(attention_case(kind, sizes, draw), queries, keys)


def _aligned_left(name: str) -> MakeMask:
    """Positions counted from each sequence's start: padding does not move them."""
    if name == "window":
        return lambda s, d: Window(5, 2, "upper_left")
    return lambda s, d: Causal("upper_left")


def seed_of(name: str) -> int:
    return sum(map(ord, name))
