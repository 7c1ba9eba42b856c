"""Statistics of a few timings: intervals of a median, outliers, which candidate is faster."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

COVERAGE = 0.95
# Tukey's fences: further than this many quartile distances from the quartiles is an outlier.
FENCE = 1.5

Interval = tuple[float, float]


def median_interval(samples: Sequence[float]) -> Interval:
    """An interval that holds the median with probability COVERAGE, whatever the distribution.

    Between two order statistics, by the binomial distribution of how many samples lie below the
    median (Conover 1999, section 3.2). Of fewer than 6 samples it is all of them, and holds the
    median with probability 1 - 2 ** (1 - n) only: 94 % of 5, 75 % of 3.

    Raises ValueError where there are no samples.
    """
    ordered = sorted(samples)
    count = len(ordered)
    if count == 0:
        raise ValueError("median_interval: expected at least one sample, got none")
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if 2 * below > 1 - COVERAGE:
            break
        rank += 1
    at = max(0, rank - 1)
    return ordered[at], ordered[count - 1 - at]


def outliers(samples: Sequence[float]) -> int:
    """The number of samples beyond Tukey's fences; they are counted, never left out."""
    if len(samples) < 4:
        return 0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    reach = FENCE * (high - low)
    return sum(not low - reach <= sample <= high + reach for sample in samples)


def overlap(first: Interval, second: Interval) -> bool:
    return first[0] <= second[1] and second[0] <= first[1]


def ratio_interval(numerator: Interval, denominator: Interval) -> Interval:
    """Where the ratio lies when each of both is in its interval."""
    return numerator[0] / denominator[1], numerator[1] / denominator[0]
