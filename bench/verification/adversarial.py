"""Inputs made to break kernels, and asserted to be what their names say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...kernels import Causal, KeyLengths
from ...kernels.testing.oracle import Arguments
from .attention_cases import Draw, Kind, Sizes, attention_arguments
from .questions import AttentionQuestion, Case, Question
from .row_cases import NORMS, RowQuestion, norm_question

SQUARE = Sizes(2, 2, 2, 40, 40, 16, 16)
LONG = Sizes(1, 2, 2, 3, 4096, 8, 8)


def _plain(sizes: Sizes, draw: Draw) -> Arguments:
    return attention_arguments(Kind(), sizes, draw)


def large_scores(draw: Draw) -> Arguments:
    """Scores in the hundreds: exp of them overflows in any type but float64."""
    arguments = _plain(SQUARE, draw)
    return replace(arguments, q=arguments.q * 200)


def very_negative(draw: Draw) -> Arguments:
    """All scores around -1000: exp of them underflows unless the row maximum comes off."""
    arguments = _plain(SQUARE, draw)
    shared = torch.full((1, 1, 1, SQUARE.Lk), -1000.0).to(draw.dtype)
    return replace(arguments, bias=shared)


def rising_scores(draw: Draw) -> Arguments:
    """The row maximum moves with every key, and so is rescaled in every tile."""
    arguments = _plain(Sizes(1, 2, 2, 20, 150, 16, 16), draw)
    rising = torch.linspace(-30.0, 30.0, 150).view(1, 1, 1, -1).to(draw.dtype)
    return replace(arguments, bias=rising)


def falling_scores(draw: Draw) -> Arguments:
    """The first key has the maximum, and the last ones next to no weight."""
    arguments = rising_scores(draw)
    assert isinstance(arguments.bias, Tensor)
    return replace(arguments, bias=arguments.bias.flip(-1))


def tiny_values(draw: Draw) -> Arguments:
    """q, k, v and the gradients near the smallest normal number's root."""
    factor = torch.finfo(draw.dtype).tiny ** 0.5
    arguments = _plain(SQUARE, draw)
    assert arguments.grad_out is not None
    return replace(
        arguments,
        q=arguments.q * factor,
        k=arguments.k * factor,
        v=arguments.v * factor,
        grad_out=arguments.grad_out * factor,
    )


def large_values(draw: Draw) -> Arguments:
    """Values near the largest number's root, beside scores of order one."""
    factor = torch.finfo(draw.dtype).max ** 0.5 / 8
    arguments = _plain(SQUARE, draw)
    return replace(arguments, v=arguments.v * factor)


def denormals(draw: Draw) -> Arguments:
    """Values below the smallest normal number, which some units flush to zero."""
    arguments = _plain(SQUARE, draw)
    v = (arguments.v.double() * torch.finfo(draw.dtype).tiny / 8).to(draw.dtype)
    assert bool((v.abs() < torch.finfo(draw.dtype).tiny).all())
    return replace(arguments, v=v)


def near_ties(draw: Draw) -> Arguments:
    """Keys that differ in the last place only: all weights are nearly equal."""
    arguments = _plain(SQUARE, draw)
    one = arguments.k[:, :, :1].expand_as(arguments.k)
    coins = draw.coins(0.5, *one.shape)
    k = torch.where(coins, one * (1 + torch.finfo(draw.dtype).eps), one)
    assert not torch.equal(k, one)
    return replace(arguments, k=k.to(draw.dtype))


def one_hot_rows(draw: Draw) -> Arguments:
    """Each query has one key that takes all of the weight."""
    arguments = _plain(SQUARE, draw)
    unit = torch.nn.functional.one_hot(torch.arange(SQUARE.Lk) % SQUARE.D, SQUARE.D)
    k = unit.to(draw.dtype).expand_as(arguments.k) * 16
    bias = torch.full((SQUARE.Lq, SQUARE.Lk), -200.0).fill_diagonal_(200.0)
    return replace(arguments, q=k.contiguous(), k=k.contiguous(), bias=bias.to(draw.dtype))


def long_equal_sums(draw: Draw) -> Arguments:
    """4096 keys of the same weight: a sum that loses its small terms, or counts in half, shows."""
    arguments = _plain(LONG, draw)
    ones = torch.ones_like(arguments.v) + 0.25 * draw.normal(*arguments.v.shape)
    return replace(arguments, k=torch.zeros_like(arguments.k), v=ones.to(draw.dtype))


def poisoned_padding(draw: Draw) -> Arguments:
    """NaN and infinities in keys and values that nobody may attend."""
    kind = Kind(lambda s, d: KeyLengths(torch.tensor([23, 0])))
    arguments = attention_arguments(kind, SQUARE, draw)
    k, v = arguments.k.clone(), arguments.v.clone()
    for tensor in (k, v):
        tensor[0, :, 23::2], tensor[0, :, 24::2], tensor[1] = torch.nan, torch.inf, -torch.inf
    return replace(arguments, k=k, v=v)


def poisoned_bias(draw: Draw) -> Arguments:
    """NaN in a bias where the mask forbids the position."""
    arguments = attention_arguments(Kind(lambda s, d: Causal()), SQUARE, draw)
    later = torch.ones(SQUARE.Lq, SQUARE.Lk, dtype=torch.bool).triu(1)
    bias = draw.normal(SQUARE.Lq, SQUARE.Lk).masked_fill(later, torch.nan)
    return replace(arguments, bias=bias)


ATTENTION: dict[str, Callable[[Draw], Arguments]] = {
    "large-scores": large_scores,
    "very-negative": very_negative,
    "rising-scores": rising_scores,
    "falling-scores": falling_scores,
    "tiny-values": tiny_values,
    "large-values": large_values,
    "denormals": denormals,
    "near-ties": near_ties,
    "one-hot-rows": one_hot_rows,
    "long-equal-sums": long_equal_sums,
    "poisoned-padding": poisoned_padding,
    "poisoned-bias": poisoned_bias,
}


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


ROWS: dict[str, Callable[[Draw], Tensor]] = {
    "far-mean": far_mean,
    "large-rows": large_rows,
    "small-rows": small_rows,
    "constant-rows": constant_rows,
    "one-outlier": one_outlier,
}


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
) -> Iterator[Case]:
    for name, make in ATTENTION.items():
        if name in kinds and "attention" in ops:
            yield _attention_case(name, make, dtype)
    for op in NORMS:
        for name, rows in ROWS.items():
            if name in kinds and op in ops:
                yield Case(op, name, (24, 512), dtype, partial(_norm, op, rows, dtype))
    for name, scores in SOFTMAX.items():
        if name in kinds and "masked_softmax" in ops:
            shape = tuple(scores(Draw(5, dtype)).shape)
            yield Case("masked_softmax", name, shape, dtype, partial(_softmax, scores, dtype))


def _softmax(make: Callable[[Draw], Tensor], dtype: torch.dtype, _with_lse: bool) -> Question:
    draw = Draw(5, dtype)
    scores = make(draw)
    return RowQuestion("masked_softmax", {"scores": scores}, (draw.normal(*scores.shape),))


def _attention_case(name: str, make: Callable[[Draw], Arguments], dtype: torch.dtype) -> Case:
    def question(with_lse: bool) -> Question:
        arguments = make(Draw(sum(map(ord, name)), dtype))
        return AttentionQuestion(arguments if with_lse else replace(arguments, grad_lse=None))

    arguments = make(Draw(0, dtype))
    sizes = (*arguments.q.shape[:2], *arguments.k.shape[1:2], *arguments.shape[2:])
    sizes = (*sizes, arguments.q.shape[3], arguments.v.shape[3])
    return Case("attention", name, sizes, dtype, question)


def _norm(op: str, rows: Callable[[Draw], Tensor], dtype: torch.dtype, _with_lse: bool) -> Question:
    draw = Draw(5, dtype)
    return norm_question(op, rows(draw), draw, ("weight", "bias"), {})
