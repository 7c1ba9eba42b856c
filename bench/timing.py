"""Interleaved timing and the statistics of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter

# A sample shorter than this is mostly timer and scheduler, so short calls are repeated in one.
SHORTEST_SAMPLE = 2e-3


@dataclass(frozen=True)
class Budget:
    """How long one case may take: rounds until `seconds` are over, within the limits."""

    seconds: float
    least_rounds: int
    most_rounds: int


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median


def summarise(samples: Iterable[float]) -> Timing:
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("summarise: expected at least one sample, got none")
    if len(ordered) == 1:
        low = median = high = ordered[0]
    else:
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Timing(median, low, high, len(ordered))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    budget: Budget,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, Timing]:
    """Times A B C, A B C, ...: what disturbs the machine for a while disturbs all of them.

    Each function is warm: it has run before, if only to pass the gate.
    """
    repeats = {}
    for name, function in functions.items():
        elapsed = []
        for _ in range(3):
            started = clock()
            function()
            elapsed.append(clock() - started)
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(min(elapsed), 1e-9)))

    samples: dict[str, list[float]] = {name: [] for name in functions}
    started = clock()
    for done in range(budget.most_rounds):
        if done >= budget.least_rounds and clock() - started >= budget.seconds:
            break
        for name, function in functions.items():
            before = clock()
            for _ in range(repeats[name]):
                function()
            samples[name].append((clock() - before) / repeats[name])
    return {name: summarise(times) for name, times in samples.items()}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("geometric_mean: expected at least one value, got none")
    return math.exp(sum(logs) / len(logs))
