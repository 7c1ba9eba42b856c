"""The oracle itself: in float64 against plain Python, its gradients against differences."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.kernels import ALiBi, Causal, KeyLengths, Window
from rowmax.kernels.backends.reference import naive_attention
from rowmax.kernels.testing.tolerance import Expected, measure

from ..tensors import rand
from . import loops
from .support import AttentionCase


def tiny(**changes: Any) -> AttentionCase:
    return replace(
        AttentionCase(q=rand(2, 4, 5, 3), k=rand(2, 2, 7, 3), v=rand(2, 2, 7, 4)), **changes
    )


TINY = {
    "plain": tiny(),
    "scale": tiny(options={"scale": -0.7}),
    "softcap": tiny(options={"softcap": 0.8}),
    "causal": tiny(mask=Causal("lower_right")),
    "window_lengths": tiny(mask=Window(2, 1, 1) & KeyLengths(torch.tensor([0, 4]))),
    "dense": tiny(mask=rand(4, 5, 7) > 0),
    "bias": tiny(bias=rand(4, 1, 7)),
    "bias_minus_inf": tiny(bias=rand(5, 7).masked_fill(rand(5, 7) > 0, -torch.inf)),
    "alibi": tiny(bias=ALiBi(rand(2, 4).abs(), align="lower_right")),
    "sinks": tiny(sinks=rand(4)),
    "sinks_masked": tiny(sinks=rand(4), mask=KeyLengths(torch.tensor([0, 4]))),
    "dropout": tiny(options={"dropout_p": 0.4, "seed": 2**40 + 7}),
    "dropout_negative_seed": tiny(options={"dropout_p": 0.6, "seed": -3}),
    "dropout_all": tiny(options={"dropout_p": 1.0, "seed": 3}),
    "everything": tiny(
        mask=Causal(3) & KeyLengths(torch.tensor([6, 2])),
        bias=rand(2, 1, 5, 7),
        sinks=rand(4),
        options={"softcap": 1.2, "scale": 0.9, "dropout_p": 0.3, "seed": 11},
    ),
}


@pytest.mark.parametrize("arguments", TINY.values(), ids=TINY.keys())
def test_forward_is_what_plain_python_says(arguments: AttentionCase) -> None:
    outs, lses = loops.attention(arguments)
    results = arguments.oracle()
    for name, flat in (("out", outs), ("lse", lses)):
        expected = torch.tensor(flat, dtype=torch.float64).view(results[name].shape)
        torch.testing.assert_close(results[name], expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["plain", "window_lengths", "bias", "sinks_masked", "everything"])
def test_gradients_by_finite_differences(name: str) -> None:
    arguments = TINY[name]
    leaves = {
        key: value.clone().requires_grad_() for key, value in arguments.differentiable().items()
    }

    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        changed: dict[str, Any] = dict(zip(leaves, tensors, strict=True))
        result = naive_attention(replace(arguments, **changed).naive_problem())
        return result.out, result.lse.masked_fill(result.lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(forward, tuple(leaves.values()))


@pytest.mark.parametrize("align", ["upper_left", "lower_right", -2, torch.tensor([1, 9])], ids=str)
def test_alibi_is_what_its_paper_says(align: Any) -> None:
    slopes = rand(2, 3).abs()
    offsets = {"upper_left": [0, 0], "lower_right": [4, 4]}.get(str(align))
    if offsets is None:
        offsets = align.tolist() if isinstance(align, Tensor) else [align, align]
    dense = ALiBi(slopes, align).dense(2, 3, 5, 9)
    for b, h, i, j in product(range(2), range(3), range(5), range(9)):
        expected = -float(slopes[b, h]) * abs(i + offsets[b] - j)
        assert math.isclose(float(dense[b, h, i, j]), expected)


def test_the_tolerance_is_a_tolerance() -> None:
    """What passes and what fails: twice the naive error, an element wrong, NaN, a lost -inf."""
    exact = rand(64)
    naive = (exact * (1 + 1e-6)).float()

    def fault(actual: Tensor, exact: Tensor = exact) -> str | None:
        return measure("out", actual, Expected(exact, naive, exact.abs()), torch.float32).fault

    assert fault(naive) is None
    assert fault((exact * (1 - 1.9e-6)).float()) is None
    assert "error" in str(fault((exact * (1 + 3e-6)).float()))
    one_wrong = naive.clone()
    one_wrong[5] += 1e-4
    assert "largest error" in str(fault(one_wrong))
    one_wrong[5] = torch.nan
    assert "NaN" in str(fault(one_wrong))
    infinite = exact.clone()
    infinite[3] = -torch.inf
    assert "not finite" in str(fault(naive, infinite))
