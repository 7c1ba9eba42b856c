"""Interleaved timing and the statistics of it, by the host's clock or by a GPU's events."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch

from .intervals import Interval, median_interval, outliers

# A sample shorter than this is mostly timer and scheduler, so short calls are repeated in one.
SHORTEST_SAMPLE = 2e-3
TRIES = 3  # calls that tell how often to repeat; one is enough for what is far from short


@dataclass(frozen=True)
class Budget:
    """How long one case may take: rounds until `seconds` are over, within the limits."""

    seconds: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int
    interval: Interval  # 95 % of the median
    outliers: int  # rounds beyond Tukey's fences: counted, not left out

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median


class Timer(Protocol):
    """How long a call takes."""

    def now(self) -> float:
        """Seconds on the host: what a budget is counted in."""

    def sample(self, function: Callable[[], object], repeats: int) -> float:
        """Seconds a call, the mean of `repeats` calls."""


class HostTimer:
    """For what has been done when the call returns."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.now = clock

    def sample(self, function: Callable[[], object], repeats: int) -> float:
        before = self.now()
        for _ in range(repeats):
            function()
        return (self.now() - before) / repeats


class LaunchTimer(HostTimer):
    """How long the host takes to launch a call, on a GPU that has nothing else to do before it."""

    def sample(self, function: Callable[[], object], repeats: int) -> float:
        torch.cuda.synchronize()
        return super().sample(function, repeats)


class Event(Protocol):
    """The part of `torch.cuda.Event` that is used here."""

    def record(self) -> None: ...
    def elapsed_time(self, end: Any, /) -> float: ...


class EventTimer:
    """GPU time between two events around each call, with nothing of the inputs in the cache.

    Before each call the GPU reads `flush` often enough to push out what the last call left in its
    cache, and to be still busy with that when the host has launched the call: so the time is the
    GPU's own, not the host's for launching many short kernels. It reads because what is written
    would stay in the cache as well, to be moved to memory at the expense of the call.
    """

    MAX_FLUSHES = 16  # for a call that itself waits for the GPU, and so can't be launched ahead

    def __init__(
        self,
        flush: Callable[[], object],
        make_event: Callable[[], Event],
        synchronize: Callable[[], object],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.now = clock
        self._flush, self._make_event, self._synchronize = flush, make_event, synchronize
        flush()
        start, end = make_event(), make_event()
        start.record()
        for _ in range(10):
            flush()
        end.record()
        synchronize()
        self._flush_seconds = max(1e-3 * start.elapsed_time(end) / 10, 1e-6)

    def sample(self, function: Callable[[], object], repeats: int) -> float:
        started = self.now()
        function()  # nothing is queued before it: this is how long the host takes to launch it
        launching = self.now() - started
        flushes = min(1 + math.ceil(launching / self._flush_seconds), self.MAX_FLUSHES)
        pairs = []
        for _ in range(repeats):
            for _ in range(flushes):
                self._flush()
            start, end = self._make_event(), self._make_event()
            start.record()
            function()
            end.record()
            pairs.append((start, end))
        self._synchronize()
        return 1e-3 * sum(start.elapsed_time(end) for start, end in pairs) / repeats


@functools.cache
def timer_for(device: str) -> Timer:
    """The timer of the device type; one, for its buffer is large."""
    if device == "cpu":
        return HostTimer()
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.ones(max(4 * cache, 2**26) // 4, device=device)
    return EventTimer(
        flush=buffer.sum,
        make_event=functools.partial(torch.cuda.Event, enable_timing=True),
        synchronize=torch.cuda.synchronize,
    )


def summarise(samples: Iterable[float]) -> Timing:
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("summarise: expected at least one sample, got none")
    if len(ordered) == 1:
        low = median = high = ordered[0]
    else:
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    interval = median_interval(ordered)
    return Timing(median, low, high, len(ordered), interval, outliers(ordered))


def interleave(
    functions: Mapping[str, Callable[[], object]], budget: Budget, timer: Timer
) -> dict[str, Timing]:
    """Times A B C, A B C, ...: what disturbs the machine for a while disturbs all of them.

    Each function is warm: it has run before, if only to pass the gate. One that runs out of GPU
    memory, beside what the others keep there, is missing from the result.
    """
    functions = dict(functions)
    samples: dict[str, list[float]] = {}

    def sample(name: str, repeats: int) -> float | None:
        try:
            return timer.sample(functions[name], repeats)
        except torch.OutOfMemoryError:
            del functions[name]
            samples.pop(name, None)
            return None

    repeats = {}
    for name in tuple(functions):
        shortest = math.inf
        for _ in range(TRIES):
            seconds = sample(name, 1)
            if seconds is None:
                break
            shortest = min(shortest, seconds)
            if seconds > 10 * SHORTEST_SAMPLE:
                break
        if name in functions:
            repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(shortest, 1e-9)))
            samples[name] = []

    started = timer.now()
    for done in range(budget.max_rounds):
        if done >= budget.min_rounds and timer.now() - started >= budget.seconds:
            break
        for name in tuple(functions):
            seconds = sample(name, repeats[name])
            if seconds is not None:
                samples[name].append(seconds)
    return {name: summarise(times) for name, times in samples.items()}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("geometric_mean: expected at least one value, got none")
    return math.exp(sum(logs) / len(logs))
