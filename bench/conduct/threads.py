"""Threads of Python that a candidate left, and whether they work while nobody calls it."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from time import perf_counter, process_time, sleep

_TASKS = Path("/proc/self/task")
_LOOK = 0.02  # seconds
_BUSY = 0.25  # of that time: more is work, and no waiting


class Threads:
    """Those that come from now on."""

    def __init__(self) -> None:
        self._before = set(sys._current_frames())
        self._working = 0.0  # seconds of processor time, while others were timed
        self._others = 0.0  # seconds that others were timed for

    def alive(self) -> set[int]:
        return set(sys._current_frames()) - self._before

    def fault(self) -> str | None:
        """Work that goes on: a pool whose threads wait for the next call is none."""
        new = self.alive()
        if not new:
            return None
        if new - {thread.ident for thread in threading.enumerate()}:
            return "it left a thread behind that the threading module does not know"
        sleep(_LOOK)  # what torch's own threads still do has then ended
        of = self.worked if _TASKS.is_dir() else process_time
        started, began = perf_counter(), of()
        sleep(_LOOK)
        if of() - began > _BUSY * (perf_counter() - started):
            return "a thread that it left behind works when it has returned"
        if self._working > _BUSY * self._others:
            return "a thread that it left behind works while others are timed"
        return None

    def others(self, seconds: float, worked: float) -> None:
        """`seconds` in which others were timed, and what the new threads worked in them."""
        self._others += seconds
        self._working += worked

    def worked(self) -> float:
        """Seconds so far in which the new threads ran or waited for a processor that others had;
        0 where the system does not tell."""
        new = self.alive()
        if not new or not _TASKS.is_dir():
            return 0.0
        seconds = 0.0
        for thread in threading.enumerate():
            if thread.ident in new:
                file = _TASKS / str(thread.native_id) / "schedstat"
                with contextlib.suppress(OSError, ValueError):  # it has ended
                    ran, waited, _ = file.read_text(encoding="ascii").split()
                    seconds += 1e-9 * (int(ran) + int(waited))
        return seconds
