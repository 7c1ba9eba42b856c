"""What the commands' options have in common: lists of names, and errors that say what was meant."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..console import UsageError, check_outputs, check_writable, set_threads
from ..kernels.backends import dispatch

__all__ = [
    "UsageError",
    "check_backend",
    "check_outputs",
    "check_writable",
    "listed",
    "names_of",
    "seconds_of",
    "set_threads",
]


def names_of(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """The names in `text`, or all of them; in the order of `known`."""
    known = list(known)
    if text is None:
        return known
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in known:
            raise UsageError(f"{option}: expected names of {listed(known)}; got {name!r}")
    return [name for name in known if name in asked]


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def seconds_of(option: str, seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"{option}: expected a positive number, got {seconds}")
    return seconds


def check_backend(name: str) -> None:
    if name == "auto":
        return
    if name not in dispatch.NAMES:
        raise UsageError(f"--backend: expected one of auto, {listed(dispatch.NAMES)}, got {name}")
    reason = dispatch.unavailable(name)
    if reason is not None:
        raise UsageError(f"--backend: {name} does not work here: {reason}")
