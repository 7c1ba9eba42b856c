"""The statistics and the interleaving."""

from __future__ import annotations

import pytest

from rowmax.bench.timing import Budget, geometric_mean, interleave, summarise


def test_median_and_quartiles() -> None:
    timing = summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.low, timing.median, timing.high, timing.rounds) == (2.0, 3.0, 4.0, 5)
    assert timing.spread == pytest.approx(2 / 3)


def test_one_outlier_does_not_move_the_median() -> None:
    assert summarise([1.0, 1.0, 1.0, 1.0, 100.0]).median == 1.0


def test_a_single_sample() -> None:
    timing = summarise([0.5])
    assert timing.low == timing.median == timing.high == 0.5


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        summarise([])


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least one value"):
        geometric_mean([])


class Clock:
    """Time passes only where a function says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def function(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def test_takes_turns_and_measures_each() -> None:
    clock = Clock()
    functions = {"a": clock.function("a", 1.0), "b": clock.function("b", 3.0)}
    timings = interleave(functions, Budget(0.0, 3, 100), clock=lambda: clock.now)
    assert clock.calls[6:] == ["a", "b"] * 3  # after three calls each to find the repeats
    assert timings["a"].median == 1.0
    assert timings["b"].median == 3.0
    assert timings["a"].rounds == timings["b"].rounds == 3


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    functions = {"short": clock.function("short", 0.5e-3), "long": clock.function("long", 1.0)}
    timings = interleave(functions, Budget(0.0, 2, 100), clock=lambda: clock.now)
    assert clock.calls[6:] == (["short"] * 4 + ["long"]) * 2
    assert timings["short"].median == pytest.approx(0.5e-3)


@pytest.mark.parametrize("seconds, rounds", [(0.0, 2), (3.5, 4), (100.0, 6)])
def test_rounds_follow_the_budget(seconds: float, rounds: int) -> None:
    clock = Clock()
    timings = interleave(
        {"a": clock.function("a", 1.0)}, Budget(seconds, 2, 6), clock=lambda: clock.now
    )
    assert timings["a"].rounds == rounds
