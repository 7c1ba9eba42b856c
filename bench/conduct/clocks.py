"""Two clocks, bound when rowmax.bench is imported: before the candidate that a command names.

They are read side by side: one that is stopped or turned back does not agree with the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from time import perf_counter

TOLERANCE = 0.05  # a share of the time measured: both run at the same rate
# Seconds between the readings of both, at most, but for a process that is never let alone.
_TOGETHER, _TRIES = 20e-6, 100


def _other() -> Callable[[], float]:
    """Of another kind: the hardware's own where the system has it, or the system's ticks."""
    if hasattr(time, "CLOCK_MONOTONIC_RAW"):
        return partial(time.clock_gettime, time.CLOCK_MONOTONIC_RAW)
    times = os.times
    return lambda: times().elapsed


host: Callable[[], float] = perf_counter
other: Callable[[], float] = _other()
_TICK = 0.0 if hasattr(time, "CLOCK_MONOTONIC_RAW") else 0.03


class ClockError(Exception):
    """The two clocks do not agree: a time that either of them gives is worth nothing."""


class Agreement:
    """From its making to `check`, both clocks must have run alike."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = self._read()

    def check(self) -> None:
        (one, two, before), (one_now, two_now, after) = self._began, self._read()
        one, two = one_now - one, two_now - two
        if abs(one - two) > TOLERANCE * max(one, two) + before + after + _TICK:
            raise ClockError(f"two clocks do not agree: {1e3 * one:.3f} ms and {1e3 * two:.3f} ms")

    def _read(self) -> tuple[float, float, float]:
        """Both clocks, and how far apart they may have been read."""
        found = []
        for _ in range(_TRIES):
            before, now, after = other(), self._clock(), other()
            found.append((now, before, after - before))
            if after - before < _TOGETHER:
                break
        return min(found, key=lambda reading: reading[2])
