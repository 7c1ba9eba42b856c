"""Interleaved timing and the statistics of it, by the host's clock or by a GPU's events."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..conduct import clocks
from .intervals import Interval, median_interval, outliers

# A sample shorter than this is mostly timer and scheduler, so short calls are repeated in one.
SHORTEST_SAMPLE = 2e-3
_Event, _synchronize = torch.cuda.Event, torch.cuda.synchronize  # as they are before a candidate
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


class Between(Protocol):
    """What is done between the calls of a sample, in no time that counts."""

    def before(self, *, last: bool) -> None:
        """Before each call; `last` of the sample."""

    @property
    def after(self) -> Callable[[Any], None] | None:
        """Gets the result of the last call, at once; None where nobody wants it."""


class Timer(Protocol):
    """How long a call takes."""

    def now(self) -> float:
        """Seconds on the host: what a budget is counted in."""

    def sample(
        self, function: Callable[[], object], repeats: int, between: Between | None = None
    ) -> float:
        """Seconds a call, the mean of `repeats` calls."""


class HostTimer:
    """For what has been done when the call returns."""

    def __init__(self, clock: Callable[[], float] = clocks.host) -> None:
        self.now = clock

    def sample(
        self, function: Callable[[], object], repeats: int, between: Between | None = None
    ) -> float:
        if between is not None:
            return self._sample_between(function, repeats, between)
        before = self.now()
        for _ in range(repeats):
            function()
        return (self.now() - before) / repeats

    def _sample_between(
        self, function: Callable[[], object], repeats: int, between: Between
    ) -> float:
        agreement, after, now = clocks.Agreement(self.now), between.after, self.now
        seconds = 0.0
        for at in range(repeats):
            is_last = at == repeats - 1
            between.before(last=is_last)
            if is_last and after is not None:
                started = now()
                result = function()
                seconds += now() - started
                after(result)
            else:
                started = now()
                function()  # and its result is given back: that is part of a call
                seconds += now() - started
        agreement.check()
        return seconds / repeats


class LaunchTimer(HostTimer):
    """How long the host takes to launch a call, on a GPU that has nothing else to do before it."""

    def sample(
        self, function: Callable[[], object], repeats: int, between: Between | None = None
    ) -> float:
        torch.cuda.synchronize()
        return super().sample(function, repeats, between)


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
        clock: Callable[[], float] = clocks.host,
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

    def sample(
        self, function: Callable[[], object], repeats: int, between: Between | None = None
    ) -> float:
        if between is not None:
            between.before(last=False)
        self._synchronize()
        agreement, started = clocks.Agreement(self.now), self.now()
        function()  # nothing is queued before it: this is how long the host takes to launch it
        launching = self.now() - started
        flushes = min(1 + math.ceil(launching / self._flush_seconds), self.MAX_FLUSHES)
        pairs = []
        for at in range(repeats):
            if between is not None:
                between.before(last=at == repeats - 1)
            for _ in range(flushes):
                self._flush()
            start, end = self._make_event(), self._make_event()
            start.record()
            result = function()
            end.record()
            pairs.append((start, end))
            if between is not None and between.after is not None and at == repeats - 1:
                between.after(result)
            del result
        self._synchronize()
        if between is not None:
            agreement.check()
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
        make_event=functools.partial(_Event, enable_timing=True),
        synchronize=_synchronize,
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


class Rounds:
    """What is timed; a subclass may change between the calls what they are given."""

    def __init__(self, calls: Mapping[str, Callable[[], object]]) -> None:
        self.calls = dict(calls)  # by name; one that is taken out is timed no more

    def begin(self, done: int, *, last: bool) -> None:
        """Before a round, after `done` others; `last` where it seems to be that."""

    def between(self, name: str) -> Between | None:  # noqa: ARG002
        """For a sample of `name`."""
        return None

    def end(self) -> None:
        """After a round."""

    def stopped(self, name: str, error: Exception) -> None:
        """`name`, whose sample raised an error, is timed no more; what is no want of memory is
        nothing that may happen here."""
        if not isinstance(error, torch.OutOfMemoryError):
            raise error
        del self.calls[name]


def interleave(
    functions: Mapping[str, Callable[[], object]] | Rounds, budget: Budget, timer: Timer
) -> dict[str, Timing]:
    """Times A B C, A B C, ...: what disturbs the machine for a while disturbs all of them.

    `Rounds` may put them into another order in every round.

    Each function is warm: it has run before, if only to pass the gate. One that runs out of GPU
    memory, beside what the others keep there, is missing from the result.
    """
    rounds = functions if isinstance(functions, Rounds) else Rounds(functions)
    samples: dict[str, list[float]] = {}

    def sample(name: str, repeats: int) -> float | None:
        try:
            return timer.sample(rounds.calls[name], repeats, rounds.between(name))
        except Exception as error:
            rounds.stopped(name, error)
            return None

    repeats = {}
    names = tuple(rounds.calls)
    rounds.begin(0, last=False)
    for name in tuple(rounds.calls):
        shortest = math.inf
        for _ in range(TRIES):
            seconds = sample(name, 1)
            if seconds is None:
                break
            shortest = min(shortest, seconds)
            if seconds > 10 * SHORTEST_SAMPLE:
                break
        if name in rounds.calls:
            repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(shortest, 1e-9)))
            samples[name] = []
    rounds.end()

    started, last = timer.now(), False
    for done in range(budget.max_rounds):
        spent = timer.now() - started
        if last and done >= budget.min_rounds and spent >= budget.seconds:
            break
        ends = done + 1 >= budget.min_rounds and spent * (done + 1) >= budget.seconds * done
        last = ends or done + 1 == budget.max_rounds
        rounds.begin(done + 1, last=last)
        for name in tuple(rounds.calls):
            seconds = sample(name, repeats[name])
            if seconds is not None:
                samples[name].append(seconds)
        rounds.end()
    return {name: summarise(samples[name]) for name in names if name in rounds.calls}


def geometric_mean(values: Iterable[float]) -> float:
    found = list(values)
    if not found:
        raise ValueError("geometric_mean: expected at least one value, got none")
    return statistics.geometric_mean(found)
