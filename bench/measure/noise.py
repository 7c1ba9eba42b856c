"""Noise in the open: which CPUs are used, how busy they are, and whether the clock drifts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from ...console import from_extra

PROBE_ROUNDS = 1 << 18  # of the loop that tells the clock's speed: some milliseconds
# Upper limits of a quiet run.
MAX_DRIFT = 0.05  # of the processor's speed, from the fastest probe to the slowest
MAX_STOLEN = 0.05  # of the time of the probes, that other programs took
MAX_NOISY = 0.25  # of the lines, marked ~


@contextmanager
def pinned(threads: int, *, wanted: bool = True) -> Iterator[list[int] | None]:
    """Keeps the process on as many CPUs as it has threads, one a core; yields them, or None.

    None where that is not wanted, the system can't, or there are no CPUs to spare: then a fixed
    choice could only be in the way. What the process might use before, it may use again after.
    """
    cpus = _one_a_core(threads) if wanted else None
    if cpus is None:
        yield None
        return
    before = os.sched_getaffinity(0)
    _move(set(cpus))
    try:
        yield cpus
    finally:
        _move(before)


def _one_a_core(threads: int) -> list[int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    if threads >= len(usable):
        return None
    cores: dict[str, int] = {}
    for cpu in usable:
        cores.setdefault(_core(cpu), cpu)
    chosen = list(cores.values())
    chosen += [cpu for cpu in usable if cpu not in chosen]
    return sorted(chosen[:threads])


def _core(cpu: int) -> str:
    """The CPUs that share a core, as the system lists them."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _move(cpus: set[int]) -> None:
    """All threads that the process has; those to come inherit it."""
    tasks = Path("/proc/self/task")
    threads = [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [0]
    for thread in threads:
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, cpus)


@dataclass
class Watch:
    """Probes of the same loop through the run: its processor time is the clock's, its other time
    that of other programs."""

    probes: list[tuple[float, float]] = field(default_factory=list)  # seconds: processor, wall

    def probe(self) -> None:
        with from_extra(None):
            from ..machine import fma  # by Numba
        fma.fma_chains(1, 0.75, 1.0)  # compiled
        started, began = thread_time(), perf_counter()
        fma.fma_chains(PROBE_ROUNDS, 0.75, 1.0)
        self.probes.append((thread_time() - started, perf_counter() - began))

    @property
    def drift(self) -> float:
        """How much slower the slowest probe was than the fastest, by processor time."""
        times = [processor for processor, _ in self.probes]
        return max(times) / min(times) - 1 if times and min(times) > 0 else 0.0

    @property
    def stolen(self) -> float:
        """The share of the probes' time that this process did not run."""
        wall = sum(wall for _, wall in self.probes)
        processor = sum(processor for processor, _ in self.probes)
        return max(0.0, 1 - processor / wall) if wall > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        return {"probes": len(self.probes), "clock_drift": self.drift, "stolen": self.stolen}


def complaints(
    watch: Watch, noisy_lines: int, lines: int, load: tuple[float, float, float] | None
) -> list[str]:
    """Why the run is not to be quoted; none for a quiet one. `load` is from before it."""
    found = []
    cpus = os.cpu_count() or 1
    if load is not None and load[0] > 0.5 * cpus:
        found.append(f"the load average was {load[0]:.1f} on {cpus} CPUs before it began")
    if watch.drift > MAX_DRIFT:
        found.append(f"the processor's speed drifted by {100 * watch.drift:.0f}%")
    if watch.stolen > MAX_STOLEN:
        found.append(f"other programs took {100 * watch.stolen:.0f}% of a core")
    if lines and noisy_lines > MAX_NOISY * lines:
        found.append(f"{noisy_lines} of {lines} lines are marked ~")
    return found
