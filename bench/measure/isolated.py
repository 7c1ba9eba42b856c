"""Work in a process of its own: a crash or a hang there costs no other work.

A kernel that reads beside its tensors leaves its process without the GPU, and one that never ends
leaves it waiting for ever.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from time import perf_counter
from typing import Any, TypeVar

from ..options import told

T = TypeVar("T")

# Loaded once, in a process that never meets the GPU, and from which the others are forked.
_LOADED = ("triton", "rowmax.bench.measure.runner", "rowmax.bench.verification.suite")
_starting = threading.Lock()


class LostError(Exception):
    """The process did not come to its end; its text says why."""


def results(function: Callable[..., Iterable[T]], *arguments: Any, seconds: float) -> Iterator[T]:
    """The results that `function` yields in a process of its own, as they come.

    Raises:
        LostError: an error there, whose traceback stands on standard error, a process that died,
            or one that was not done after `seconds` and has been ended.
    """
    ends = perf_counter() + seconds
    context = _context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, function, arguments))  # type: ignore[attr-defined]
    with _starting:
        process.start()
    there.close()
    try:
        while True:
            if not here.poll(max(0.0, ends - perf_counter())):
                raise LostError(f"not done after {seconds:g} seconds")
            try:
                kind, value = here.recv()
            except EOFError:
                process.join(10)
                raise LostError(f"its process ended with status {process.exitcode}") from None
            if kind == "end":
                return
            if kind == "error":
                raise LostError(value)
            yield value
    finally:
        here.close()
        process.kill()
        process.join(10)


@functools.cache
def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LOADED))
    return context


def _work(
    connection: Connection, function: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]
) -> None:
    last: tuple[str, str | None]
    # torch says so once a process, of its own thread that runs a backward pass: it means nothing
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA")
    try:
        for value in function(*arguments):
            connection.send(("result", value))
        last = ("end", None)
    except Exception as error:
        traceback.print_exc()
        last = ("error", told(error))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(last)
