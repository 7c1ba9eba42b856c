"""The statistics: intervals cover what they say, outliers are counted, level is level."""

from __future__ import annotations

import random
import statistics

import pytest

from rowmax.bench.measure.intervals import median_interval, outliers, overlap, ratio_interval
from rowmax.bench.measure.timing import summarise


def test_known_ranks() -> None:
    """Conover's table: of 10 samples the 2nd and the 9th, of 20 the 6th and the 15th."""
    assert median_interval(range(1, 11)) == (2, 9)
    assert median_interval(range(1, 21)) == (6, 15)
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0)


@pytest.mark.parametrize("count", [6, 9, 17, 60])
def test_the_median_is_in_it_as_often_as_it_says(count: int) -> None:
    """Of a skewed distribution too, as timings are."""
    draw = random.Random(count)
    true_median = 2**0.5
    held = 0
    for _ in range(2000):
        low, high = median_interval([draw.paretovariate(2) for _ in range(count)])
        held += low <= true_median <= high
    # five standard deviations below, and not all of them: an interval may be too wide as well
    assert 0.95 - 5 * (0.95 * 0.05 / 2000) ** 0.5 < held / 2000 < 0.999


def test_it_narrows_with_more_samples() -> None:
    draw = random.Random(1)
    samples = [draw.gauss(1.0, 0.1) for _ in range(200)]
    few, many = median_interval(samples[:10]), median_interval(samples)
    assert many[1] - many[0] < (few[1] - few[0]) / 2


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        median_interval([])


def test_outliers_are_counted_and_kept() -> None:
    samples = [1.0, 1.01, 1.02, 0.99, 1.0, 1.03, 9.0]
    assert outliers(samples) == 1
    assert outliers(samples[:6]) == 0
    assert outliers([1.0, 9.0]) == 0
    timing = summarise(samples)
    assert (timing.outliers, timing.rounds) == (1, 7)
    assert timing.median == statistics.median(samples)
    assert timing.interval == median_interval(samples)


def test_level_and_ratio() -> None:
    assert overlap((1.0, 2.0), (2.0, 3.0))
    assert overlap((1.0, 4.0), (2.0, 3.0))
    assert not overlap((1.0, 1.9), (2.0, 3.0))
    assert ratio_interval((2.0, 4.0), (1.0, 2.0)) == (1.0, 4.0)
