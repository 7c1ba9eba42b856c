"""The cross entropy of a linear projection as the equations say it, the logits written out.

Szegedy et al. 2016, section 7, smooth the targets: q = (1 - s) * [j = target] + s / V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.layout import statistics_dtype
from ...ops.problem import LinearCrossEntropyProblem


def linear_cross_entropy(
    problem: LinearCrossEntropyProblem,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss = sum_j -q_j * log softmax(x @ weight^T)_j; gradients, by p - q, of the tokens' sum."""
    x, weight, target, _, ignore_index, mean, x_grad, weight_grad = problem
    logits = (x @ weight.t()).to(statistics_dtype(x.dtype))
    used = target != ignore_index
    wanted = wanted_distribution(problem, logits.dtype)
    log_p = logits.log_softmax(-1)
    # (a logit of -inf beside a wanted probability of 0 adds nothing)
    losses = -(log_p * wanted).masked_fill(wanted == 0.0, 0.0).sum(-1)
    losses = losses.masked_fill(~is_word(problem), torch.nan)
    count = used.sum() if mean else 1
    loss = losses.masked_fill(~used, 0.0).sum() / count
    d_logits = (log_p.exp() - wanted).masked_fill(~used.unsqueeze(-1), 0.0).to(x.dtype)
    d_x = d_logits @ weight if x_grad else None
    wide = logits.dtype
    d_weight = d_logits.to(wide).t() @ x.to(wide) if weight_grad else None
    return loss, d_x, d_weight


def wanted_distribution(problem: LinearCrossEntropyProblem, dtype: torch.dtype) -> Tensor:
    """q (T, V), NaN where a target is no word; of an ignored token as if it were the first."""
    target, smoothing, vocabulary = problem.target, problem.label_smoothing, len(problem.weight)
    known = target.masked_fill(target == problem.ignore_index, 0)
    words = torch.arange(vocabulary, device=target.device)
    hit = (words == known.unsqueeze(-1)).to(dtype)
    wanted = hit * (1.0 - smoothing) + smoothing / max(1, vocabulary)
    unknown = (target != problem.ignore_index) & ~is_word(problem)
    return wanted.masked_fill(unknown.unsqueeze(-1), torch.nan)


def is_word(problem: LinearCrossEntropyProblem) -> Tensor:
    """Which targets (T,) are words of the vocabulary."""
    return (problem.target >= 0) & (problem.target < len(problem.weight))


def token_scale(problem: LinearCrossEntropyProblem, dtype: torch.dtype) -> Tensor:
    """The factor of each token's loss: 1 / tokens of the mean, 0 where there are none."""
    target = problem.target
    if not problem.mean:
        return torch.ones((), dtype=dtype, device=target.device)
    count = (target != problem.ignore_index).sum().to(dtype)
    return torch.where(count > 0.0, 1.0 / count, 0.0)
