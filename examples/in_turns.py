"""Ways to do the same, timed in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def medians(*calls: Callable[[], object], seconds: float = 1.5) -> list[float]:
    """Median seconds of each call; each is called once untimed."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for call, own in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in times]


def gain(before: Callable[[], object], after: Callable[[], object], seconds: float = 1.5) -> str:
    """How much faster `after` is than `before`, in words."""
    old, new = medians(before, after, seconds=seconds)
    return (
        f"gain on this machine: x {old / new:.2f} ({1e3 * old:.1f} ms before, {1e3 * new:.1f} ms "
        "after, medians of calls in turns)"
    )
