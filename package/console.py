"""What all commands have in common: streams, exit statuses, and words for what can't be done.

Exit status 2: a call that can't be done; 130: interrupted; 141: the reader of the output went away,
as shells count a process that SIGINT or SIGPIPE ended.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .waiting import chosen, usable_cpus

_INTERRUPTED, _CLOSED = 130, 141
_MOST_THREADS = 1024
# Text is UTF-8 whatever the locale says. File names and arguments may hold bytes that are not: they
# are written as they came, and shown as escapes in messages. Of a line's ends only "\n" counts.
_STREAMS: dict[str, dict[str, Any]] = {
    "stdin": {"encoding": "utf-8", "newline": "\n"},
    "stdout": {"encoding": "utf-8", "errors": "surrogateescape"},
    "stderr": {"encoding": "utf-8", "errors": "backslashreplace"},
}


class UsageError(Exception):
    """A call that can't be meant; its text goes to the user."""


class MissingExtraError(ImportError):
    """A package that one of rowmax's extras brings is not installed."""


@contextlib.contextmanager
def from_extra(extra: str | None) -> Iterator[None]:
    """Around imports: what is not installed is named with the extra of rowmax that brings it.

    None stands for rowmax's own requirements, of which most of it needs torch alone.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        wanted = "rowmax" if extra is None else f'"rowmax[{extra}]"'
        raise MissingExtraError(
            f"{error.name} is not installed: pip install {wanted}", name=error.name
        ) from error


def run(command: Callable[[], int], prefix: str, errors: tuple[type[Exception], ...] = ()) -> int:
    """The exit status of `command`. These errors of its, and those of files, become a sentence."""
    expected: tuple[type[Exception], ...] = (MissingExtraError, OSError, *errors)
    try:
        try:
            _prepare_streams()
            return command()
        finally:
            sys.stdout.flush()  # here, where it can be told that nobody reads it
    except BrokenPipeError:
        _say(f"{prefix}the output was closed before all of it was written")
        with contextlib.suppress(OSError, ValueError):  # so that Python's own flush says nothing
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted")
        return _INTERRUPTED
    except expected as error:
        _say(f"{prefix}{error}")
        return 2


def check_writable(option: str, path: Path) -> None:
    """UsageError where a file can't be written: found out before the work, not after it."""
    existed = os.path.lexists(path)
    try:
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{option}: can't write {path}: {error.strerror}") from error


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Mapping[str, Path | None] | None = None,
    folders: Mapping[str, Iterable[Path]] | None = None,
) -> None:
    """UsageError where a file, by its option, can't be written or is one that the command reads.

    `folders` are those whose files are read. No two outputs may be one file either. Devices and
    pipes, as /dev/null, may be named more than once.
    """
    others = dict(inputs or {})
    for option, path in outputs.items():
        if path is None:
            continue
        for name, other in others.items():
            if other is not None and _one_file(path, other):
                raise UsageError(f"{option}: {path} is the file that {name} names; give another")
        for name, within in (folders or {}).items():
            for folder in within:
                if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                    raise UsageError(
                        f"{option}: {path} lies in {folder}, which {name} reads; give another"
                    )
        check_writable(option, path)
        others[option] = path


def _one_file(path: Path, other: Path) -> bool:
    """Whether both are, or when written will be, one regular file."""
    try:
        return path.samefile(other) and path.is_file()
    except OSError:  # one of them is not there yet
        return os.path.realpath(path) == os.path.realpath(other)


def set_threads(threads: int | None) -> None:
    """`--threads`, or torch's own choice within what the process may use; UsageError beyond what an
    OpenMP runtime starts."""
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"--threads: expected at least 1, at most {_MOST_THREADS}, got {threads}")
    import torch

    if threads is None:
        threads = min(torch.get_num_threads(), usable_cpus())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def threads_line() -> str:
    """How many threads work, and how they wait."""
    import torch

    return f"{torch.get_num_threads()} threads of {usable_cpus()} CPUs, {chosen(os.environ)}"


def check_text(what: str, text: str) -> None:
    """UsageError where an argument is not UTF-8: Python hands other bytes over as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not UTF-8: {text!r}") from error


def _prepare_streams() -> None:
    """Of an output that came closed Python makes None, for which `print` takes standard output."""
    for name, settings in _STREAMS.items():
        if getattr(sys, name) is None and name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # read from before
                stream.reconfigure(**settings)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
