"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(
    *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python words`, with more in its environment; its output and how it ended."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
    )


def printed(*words: str, cwd: Path | None = None, **environment: str) -> str:
    """What it prints; it must end well."""
    done = python(*words, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
