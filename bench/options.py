"""Shared by all commands: lists of names, former names, and errors that say what was expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ..console import UsageError, check_outputs, check_writable, set_threads
from ..kernels.backends import dispatch

__all__ = [
    "UsageError",
    "check_backend",
    "check_outputs",
    "check_writable",
    "current_name",
    "first_fault",
    "first_line",
    "listed",
    "names_of",
    "renamed",
    "seconds_of",
    "set_threads",
    "told",
    "write",
]


# Former names that each option still accepts.
RENAMED = {
    "--kind": {"plain": "full"},
    "--feature": {"plain": "full"},
    "--features": {"plain": "base", "rich": "score_mod", "rich_dropout": "score_mod_dropout"},
    "--kernel": {
        "key_gradients": "backward_dkdv",
        "query_gradients": "backward_dq",
        "bias_gradients": "backward_dbias",
    },
}


def names_of(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """The names in `text`, or all of them; in the order of `known`."""
    known = list(known)
    if text is None:
        return known
    chosen = [name.strip() for name in text.split(",")]
    chosen = [current_name(option, n) if renamed(option, n) in known else n for n in chosen]
    for name in chosen:
        if name not in known:
            raise UsageError(f"{option}: expected names of {listed(known)}; got {name!r}")
    return [name for name in known if name in chosen]


def renamed(option: str, name: str) -> str:
    """`name`, or the name that has replaced it; each part of those that are joined by +."""
    former = RENAMED.get(option, {})
    return "+".join(former.get(part, part) for part in name.split("+"))


def current_name(option: str, name: str) -> str:
    """`renamed`, with a message on standard error where it has replaced the name."""
    current = renamed(option, name)
    if current != name:
        print(f"rowmax.bench: {option} {name} is deprecated: use {current}", file=sys.stderr)
    return current


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def told(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_fault(faults: Iterable[str | None]) -> str | None:
    """None where there is none; what comes after the first is not asked for."""
    return next((fault for fault in faults if fault is not None), None)


def write(path: Path | None, text: Callable[[], str]) -> None:
    """Into the file that an option names, where it was given."""
    if path is not None:
        path.write_text(text(), encoding="utf-8")


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
