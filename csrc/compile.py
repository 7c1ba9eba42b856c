"""Compile C++ sources, as many at a time as there are cores, and only what has changed.

setup.py and tests/csrc/run_parity.py use it. A source is compiled again where its command is new or
a file that it includes is younger than its object. CXX names the compiler (c++), MAX_JOBS how many
may run at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class CompileError(RuntimeError):
    """The compiler's command and what it said."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def target_machine(command: list[str]) -> str:
    """The processor that it compiles for, as `platform.machine` names it; "" if unknown."""
    try:
        done = subprocess.run(
            [*command, "-dumpmachine"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().split("-")[0]


def compile_sources(command: list[str], sources: Iterable[tuple[Path, Path, list[str]]]) -> None:
    """Each (source, object, flags), by `command` with CPPFLAGS and CXXFLAGS of the environment."""
    extra = [*_flags("CPPFLAGS"), *_flags("CXXFLAGS")]
    steps = [
        ([*command, *extra, *flags, "-MMD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)])
        for source, made, flags in sources
    ]
    with ThreadPoolExecutor(_jobs()) as pool:
        for _ in pool.map(_compile, steps):
            pass


def link(command: list[str], objects: Iterable[Path], made: Path, flags: list[str]) -> None:
    """The objects as one program or library, with LDFLAGS of the environment."""
    made.parent.mkdir(parents=True, exist_ok=True)
    _run([*command, *map(str, objects), *flags, *_flags("LDFLAGS"), "-o", str(made)])


def _compile(step: list[str]) -> None:
    made = Path(step[-1])
    with_command = made.with_name(f"{made.name}.command")
    line = shlex.join(step)
    if with_command.is_file() and with_command.read_text() == line and not _outdated(made):
        return
    made.parent.mkdir(parents=True, exist_ok=True)
    _run(step)
    with_command.write_text(line)


def _outdated(made: Path) -> bool:
    """Whether an object is missing, or a file that it was made from is younger or missing."""
    try:
        rule = Path(f"{made}.d").read_text().replace("\\\n", " ")
        read = re.split(r"(?<!\\)\s+", rule.split(": ", 1)[1].strip())
        newest = max(os.stat(name.replace("\\ ", " ")).st_mtime_ns for name in read)
        return made.stat().st_mtime_ns <= newest
    except OSError:
        return True


def _run(step: list[str]) -> None:
    done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(step)}: exit status {done.returncode}\n{done.stdout}")
    if done.stdout:
        print(done.stdout, end="", file=sys.stderr)


def _jobs() -> int:
    asked = os.environ.get("MAX_JOBS")
    if asked:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))
