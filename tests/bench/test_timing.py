"""The statistics and the interleaving."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rowmax.bench.measure.timing import (
    Budget,
    EventTimer,
    HostTimer,
    geometric_mean,
    interleave,
    summarise,
    timer_for,
)


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
    timings = interleave(functions, Budget(0.0, 3, 100), timer=HostTimer(lambda: clock.now))
    assert clock.calls[2:] == ["a", "b"] * 3  # after a call each to find the repeats
    assert timings["a"].median == 1.0
    assert timings["b"].median == 3.0
    assert timings["a"].rounds == timings["b"].rounds == 3


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    functions = {"short": clock.function("short", 0.5e-3), "long": clock.function("long", 1.0)}
    timings = interleave(functions, Budget(0.0, 2, 100), timer=HostTimer(lambda: clock.now))
    assert clock.calls[4:] == (["short"] * 4 + ["long"]) * 2
    assert timings["short"].median == pytest.approx(0.5e-3)


@pytest.mark.parametrize("seconds, rounds", [(0.0, 2), (3.5, 4), (100.0, 6)])
def test_rounds_follow_the_budget(seconds: float, rounds: int) -> None:
    clock = Clock()
    timings = interleave(
        {"a": clock.function("a", 1.0)}, Budget(seconds, 2, 6), HostTimer(lambda: clock.now)
    )
    assert timings["a"].rounds == rounds


def test_what_runs_out_of_memory_is_left_out() -> None:
    """At first, or after some rounds, when the others' graphs have grown."""
    clock = Clock()
    left = {"at once": 0, "later": 4}

    def greedy(name: str) -> Callable[[], None]:
        def run() -> None:
            left[name] -= 1
            clock.now += 1.0
            if left[name] < 0:
                raise torch.OutOfMemoryError("no more")

        return run

    functions = {"a": clock.function("a", 1.0), **{name: greedy(name) for name in left}}
    timings = interleave(functions, Budget(0.0, 5, 100), HostTimer(lambda: clock.now))
    assert set(timings) == {"a"}
    assert timings["a"].rounds == 5


class FakeGpu:
    """A queue: the host launches at once and goes on, the GPU works it off."""

    FLUSH = 100e-6

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.flushes = 0

    def launch(self, host_seconds: float, gpu_seconds: float) -> None:
        self.host += host_seconds
        self.gpu = max(self.gpu, self.host) + gpu_seconds

    def flush(self) -> None:
        self.flushes += 1
        self.launch(1e-6, self.FLUSH)

    def synchronize(self) -> None:
        self.host = max(self.host, self.gpu)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def timer(self) -> EventTimer:
        return EventTimer(self.flush, self.event, self.synchronize, clock=lambda: self.host)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.at = 0.0

    def record(self) -> None:
        self.gpu.launch(1e-6, 0.0)
        self.at = self.gpu.gpu

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("launching", [5e-6, 80e-6, 700e-6])
def test_events_see_the_gpus_time_and_not_the_hosts(launching: float) -> None:
    """A kernel of 20 us, however long the host takes to launch it; the flushes are not counted."""
    gpu = FakeGpu()
    timer = gpu.timer()
    before = gpu.flushes
    for repeats in (1, 30):
        seconds = timer.sample(lambda: gpu.launch(launching, 20e-6), repeats)
        assert seconds == pytest.approx(20e-6)
    assert gpu.flushes - before >= 31


def test_a_call_that_waits_for_the_gpu_is_timed_with_its_wait() -> None:
    gpu = FakeGpu()

    def call() -> None:
        gpu.launch(10e-6, 50e-3)
        gpu.synchronize()

    assert gpu.timer().sample(call, 2) == pytest.approx(50e-3, rel=0.01)


def test_the_cpus_timer() -> None:
    assert isinstance(timer_for("cpu"), HostTimer)
    assert timer_for("cpu").sample(lambda: None, 3) >= 0.0
