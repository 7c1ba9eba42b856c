"""Running one machine function on several threads, and the memory they work in.

The threads are torch's own: its OpenMP runtime is asked directly, so there is one pool in the
process and `torch.set_num_threads` is obeyed. Work is handed out by an atomic counter (`take_work`
in the kernel); each task writes only its own results, in an order of sums that does not depend on
the thread, so the bits are the same for any number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

COUNTERS = 64  # bytes: eight int64 counters that start at zero
HEADER = 4096  # bytes for the counters and the largest record
_ALIGNMENT = 64
_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _State:
    """Whether threads were started by this process, or by the one it was forked from."""

    started = False
    inherited = False


def _after_fork() -> None:
    # OpenMP's threads do not survive a fork, and waiting for them would hang: a child of a process
    # that had started them works alone, with the same bits.
    _State.inherited = _State.inherited or _State.started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _openmp_parallel() -> Callable[..., None] | None:
    """GOMP_parallel(function, argument, threads, flags) of torch's OpenMP runtime, or None."""
    folder = Path(torch.__file__).parent / "lib"
    for library in sorted(folder.glob("libtorch_cpu.*")) + sorted(folder.glob("lib*omp*")):
        try:
            function = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


def thread_count(tasks: int) -> int:
    """How many threads will take `tasks` tasks."""
    return 1 if tasks <= 1 or _State.inherited else min(torch.get_num_threads(), tasks)


def run(function: int, argument: int, threads: int) -> None:
    """Call `void function(void *argument)` once on each of `threads` threads, without the GIL."""
    worker = _worker(function)
    if threads == 1:
        worker(argument)
        return
    _State.started = True
    parallel = _openmp_parallel()
    if parallel is not None:
        parallel(function, argument, threads, 0)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(worker, argument) for _ in range(threads)]:
            done.result()


@functools.cache
def _worker(function: int) -> Callable[[int], None]:
    return _WORKER(function)


class Workspace:
    """Memory for one kernel call: a header of COUNTERS and the record, and the threads' scratch.

    All aligned to 64 bytes. Contents are arbitrary.
    """

    def __init__(self) -> None:
        self.header = bytearray(HEADER + _ALIGNMENT)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.header))
        self.header_start = -address % _ALIGNMENT
        self.header_address = address + self.header_start
        self._memory = np.empty(0, dtype=np.uint8)
        self._size, self._start = -1, 0

    def scratch(self, size: int) -> int:
        """The address of at least `size` bytes; kept, and grown when a call needs more."""
        if self._size < size:
            self._memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
            start: int = self._memory.ctypes.data
            self._size, self._start = size, start + -start % _ALIGNMENT
        return self._start


class _Kept(threading.local):
    """The workspace of each Python thread between its calls."""

    workspace: Workspace | None = None


_kept = _Kept()


def take_workspace() -> Workspace:
    """The calling thread's workspace; a new one where it is in use, as in a signal's handler."""
    workspace = _kept.workspace
    if workspace is None:
        return Workspace()
    _kept.workspace = None
    return workspace


def give_back(workspace: Workspace) -> None:
    _kept.workspace = workspace
