"""Inputs made to break kernels, and asserted to be what their names say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..api.masks import Causal, KeyLengths
from .cases import Draw, Kind, NamedCase, Shape, attention_case, seed_of
from .oracle import AttentionCase, TestCase
from .rows import NORMS, RowCase, norm_case

_Maker = TypeVar("_Maker", bound=Callable[..., Any])
SQUARE = Shape(2, 2, 2, 40, 40, 16, 16)
LONG = Shape(1, 2, 2, 3, 4096, 8, 8)


def _by_name(*makers: _Maker) -> dict[str, _Maker]:
    return {make.__name__.replace("_", "-"): make for make in makers}


def _base(sizes: Shape, draw: Draw) -> AttentionCase:
    return attention_case(Kind(), sizes, draw)


def large_scores(draw: Draw) -> AttentionCase:
    """Scores in the hundreds: exp of them overflows in any type but float64."""
    case = _base(SQUARE, draw)
    return replace(case, q=case.q * 200)


def very_negative(draw: Draw) -> AttentionCase:
    """All scores around -1000: exp of them underflows unless the row maximum comes off."""
    case = _base(SQUARE, draw)
    shared = torch.full((1, 1, 1, SQUARE.Lk), -1000.0).to(draw.dtype)
    return replace(case, bias=shared)


def rising_scores(draw: Draw) -> AttentionCase:
    """The row maximum moves with every key, and so is rescaled in every tile."""
    case = _base(Shape(1, 2, 2, 20, 150, 16, 16), draw)
    rising = torch.linspace(-30.0, 30.0, 150).view(1, 1, 1, -1).to(draw.dtype)
    return replace(case, bias=rising)


def falling_scores(draw: Draw) -> AttentionCase:
    """The first key has the maximum, and the last ones next to no weight."""
    case = rising_scores(draw)
    assert isinstance(case.bias, Tensor)
    return replace(case, bias=case.bias.flip(-1))


def tiny_values(draw: Draw) -> AttentionCase:
    """q, k, v and the gradients near the smallest normal number's root."""
    factor = torch.finfo(draw.dtype).tiny ** 0.5
    case = _base(SQUARE, draw)
    assert case.grad_out is not None
    return replace(
        case,
        q=case.q * factor,
        k=case.k * factor,
        v=case.v * factor,
        grad_out=case.grad_out * factor,
    )


def large_values(draw: Draw) -> AttentionCase:
    """Values near the largest number's root, beside scores of order one."""
    factor = torch.finfo(draw.dtype).max ** 0.5 / 8
    case = _base(SQUARE, draw)
    return replace(case, v=case.v * factor)


def denormals(draw: Draw) -> AttentionCase:
    """Values below the smallest normal number, which some units flush to zero."""
    case = _base(SQUARE, draw)
    v = (case.v.double() * torch.finfo(draw.dtype).tiny / 8).to(draw.dtype)
    assert bool((v.abs() < torch.finfo(draw.dtype).tiny).all())
    return replace(case, v=v)


def near_ties(draw: Draw) -> AttentionCase:
    """Keys that differ in the last place only: all weights are nearly equal."""
    case = _base(SQUARE, draw)
    one = case.k[:, :, :1].expand_as(case.k)
    coins = draw.coins(0.5, *one.shape)
    k = torch.where(coins, one * (1 + torch.finfo(draw.dtype).eps), one)
    assert not torch.equal(k, one)
    return replace(case, k=k.to(draw.dtype))


def one_hot_rows(draw: Draw) -> AttentionCase:
    """Each query has one key that takes all of the weight."""
    case = _base(SQUARE, draw)
    unit = torch.nn.functional.one_hot(torch.arange(SQUARE.Lk) % SQUARE.D, SQUARE.D)
    k = unit.to(draw.dtype).expand_as(case.k) * 16
    bias = torch.full((SQUARE.Lq, SQUARE.Lk), -200.0).fill_diagonal_(200.0)
    return replace(case, q=k.contiguous(), k=k.contiguous(), bias=bias.to(draw.dtype))


def long_equal_sums(draw: Draw) -> AttentionCase:
    """4096 keys of the same weight: a sum that loses its small terms, or counts in half, shows."""
    case = _base(LONG, draw)
    ones = torch.ones_like(case.v) + 0.25 * draw.normal(*case.v.shape)
    return replace(case, k=torch.zeros_like(case.k), v=ones.to(draw.dtype))


def poisoned_padding(draw: Draw) -> AttentionCase:
    """NaN and infinities in keys and values that nobody may attend."""
    kind = Kind(lambda s, d: KeyLengths(torch.tensor([23, 0])))
    case = attention_case(kind, SQUARE, draw)
    k, v = case.k.clone(), case.v.clone()
    for tensor in (k, v):
        tensor[0, :, 23::2], tensor[0, :, 24::2], tensor[1] = torch.nan, torch.inf, -torch.inf
    return replace(case, k=k, v=v)


def poisoned_bias(draw: Draw) -> AttentionCase:
    """NaN in a bias where the mask forbids the position."""
    case = attention_case(Kind(lambda s, d: Causal()), SQUARE, draw)
    later = torch.ones(SQUARE.Lq, SQUARE.Lk, dtype=torch.bool).triu(1)
    bias = draw.normal(SQUARE.Lq, SQUARE.Lk).masked_fill(later, torch.nan)
    return replace(case, bias=bias)


ATTENTION: dict[str, Callable[[Draw], AttentionCase]] = _by_name(
    *(large_scores, very_negative, rising_scores, falling_scores, tiny_values, large_values),
    *(denormals, near_ties, one_hot_rows, long_equal_sums, poisoned_padding, poisoned_bias),
)


def far_mean(draw: Draw) -> Tensor:
    """Mean 1e4, deviation 1, as far as the type can hold both: the mean of squares cancels."""
    mean = min(1e4, 0.25 / torch.finfo(draw.dtype).eps)
    return (mean + draw.normal(24, 512).double()).to(draw.dtype)


def large_rows(draw: Draw) -> Tensor:
    """Squares near the largest number that the sum of them can hold."""
    most = torch.finfo(draw.dtype).max
    return draw.normal(24, 512) * min(most / 8, torch.finfo(torch.float32).max ** 0.5 / 64)


def small_rows(draw: Draw) -> Tensor:
    """A variance far below eps: the output is x times eps to the power of -1/2."""
    return draw.normal(24, 512) * 1e-4


def constant_rows(draw: Draw) -> Tensor:
    """No deviation at all but in every fourth row."""
    x = draw.normal(24, 1).expand(24, 512).clone()
    x[::4] = draw.normal(6, 512)
    return x


def one_outlier(draw: Draw) -> Tensor:
    """One element of each row outweighs all the others."""
    x = draw.normal(24, 512)
    x[:, 7] = 1000.0
    return x


ROWS: dict[str, Callable[[Draw], Tensor]] = _by_name(
    far_mean, large_rows, small_rows, constant_rows, one_outlier
)


def softmax_large(draw: Draw) -> Tensor:
    """Scores in the hundreds, of both signs."""
    return draw.normal(2, 2, 20, 150) * 200


def softmax_negative(draw: Draw) -> Tensor:
    """All scores around -1000."""
    return draw.normal(2, 2, 20, 150) - 1000


def softmax_equal(draw: Draw) -> Tensor:
    """4096 equal scores a row."""
    return torch.zeros(1, 1, 3, 4096).to(draw.dtype)


SOFTMAX: dict[str, Callable[[Draw], Tensor]] = {
    "large-scores": softmax_large,
    "very-negative": softmax_negative,
    "long-equal-sums": softmax_equal,
}
KINDS = (*ATTENTION, *ROWS)


def adversarial_cases(
    ops: tuple[str, ...], dtype: torch.dtype, kinds: tuple[str, ...]
) -> Iterator[NamedCase]:
    for name, make in ATTENTION.items():
        if name in kinds and "attention" in ops:
            case = make(Draw(0, dtype))
            sizes = (*case.q.shape[:2], *case.k.shape[1:2], *case.shape[2:])
            sizes = (*sizes, case.q.shape[3], case.v.shape[3])
            yield NamedCase("attention", name, sizes, dtype, partial(_case, name, dtype))
    for op in NORMS:
        for name, rows in ROWS.items():
            if name in kinds and op in ops:
                yield NamedCase(op, name, (24, 512), dtype, partial(_norm, op, rows, dtype))
    for name, scores in SOFTMAX.items():
        if name in kinds and "masked_softmax" in ops:
            shape = tuple(scores(Draw(5, dtype)).shape)
            yield NamedCase("masked_softmax", name, shape, dtype, partial(_softmax, scores, dtype))


def _case(name: str, dtype: torch.dtype) -> TestCase:
    return ATTENTION[name](Draw(seed_of(name), dtype))


def _norm(op: str, rows: Callable[[Draw], Tensor], dtype: torch.dtype) -> TestCase:
    draw = Draw(5, dtype)
    return norm_case(op, rows(draw), draw, ("weight", "bias"), {})


def _softmax(make: Callable[[Draw], Tensor], dtype: torch.dtype) -> TestCase:
    draw = Draw(5, dtype)
    scores = make(draw)
    return RowCase("masked_softmax", {"scores": scores}, (draw.normal(*scores.shape),))
