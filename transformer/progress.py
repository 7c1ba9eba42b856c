"""How far a long job is: a bar on a terminal, and in a file, which keeps all, a line a minute."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NoReturn, TextIO

from ..console import from_extra

if TYPE_CHECKING:  # loaded where there is a terminal
    from tqdm import tqdm

EVERY = 60.0  # seconds


class _Lines:
    """What is used of tqdm's bar: a line for each minute, and one at the end."""

    def __init__(self, stream: TextIO, title: str, unit: str, total: int, done: int) -> None:
        self._stream, self._title, self._unit = stream, title, unit
        self._total, self._done = total, done
        self._text, self._told, self._last = "", done, time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._done > self._told:
            self._tell()

    def set_postfix_str(self, text: str, *, refresh: bool) -> None:  # noqa: ARG002
        self._text = text

    def update(self) -> None:
        self._done += 1
        if time.monotonic() - self._last >= EVERY:
            self._tell()

    def write(self, line: str, file: TextIO) -> None:
        print(line, file=file, flush=True)

    def _tell(self) -> None:
        self._told, self._last = self._done, time.monotonic()
        text = f", {self._text}" if self._text else ""
        line = f"{self._title}: {self._done}/{self._total} {self._unit}s{text}"
        print(line, file=self._stream, flush=True)


def progress_on(
    stream: TextIO, title: str, unit: str, total: int, done: int
) -> tqdm[NoReturn] | _Lines:
    """Progress from ``done`` to ``total``, told on ``stream``."""
    if not stream.isatty():
        return _Lines(stream, title, unit, total, done)
    with from_extra("transformer"):
        from tqdm import tqdm
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        file=stream,
        dynamic_ncols=True,
        mininterval=0.5,
    )
