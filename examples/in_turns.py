"""Two ways to do the same, timed in turns, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def gain(before: Callable[[], object], after: Callable[[], object], seconds: float = 1.5) -> str:
    """How much faster `after` is than `before`, in words; each is called once untimed."""
    calls = (before, after)
    times: tuple[list[float], list[float]] = ([], [])
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for call, own in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            own.append(time.perf_counter() - started)
    old, new = (statistics.median(own) for own in times)
    return (
        f"gain on this machine: x {old / new:.2f} ({1e3 * old:.1f} ms before, {1e3 * new:.1f} ms "
        f"after, medians of {len(times[0])} calls in turns)"
    )
