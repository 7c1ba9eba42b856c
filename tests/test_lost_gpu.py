"""A test that loses the GPU ends its process, and costs no later test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
# a GPU that the second test loses: from then on every call of it in the same process is an error
TESTS = """
import pytest
import torch

lost = False


def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize


@pytest.mark.parametrize("number", range(6))
def test_number(number):
    global lost
    assert not lost
    lost = number == 1
    assert not lost, "the first error"
    assert number != 4, "an ordinary error"
"""


def run(folder: Path, *options: str, stop_at: str = "inf", status: int = 1) -> str:
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_numbers.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    environment["ROWMAX_STOP_AT"] = stop_at
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == status
    return result.stdout + result.stderr


def test_its_process_is_replaced(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    said = run(tmp_path, "-n", "1")
    assert "2 failed, 4 passed" in said
    assert re.search(r"worker 'gw0' crashed while running '.*test_number\[1\]'", said)
    assert "the first error" in said
    assert "an ordinary error" in said


def test_alone_it_is_the_last(tmp_path: Path) -> None:
    said = run(tmp_path, "-p", "no:xdist")
    assert "1 passed" in said
    assert "test_number[1] lost the GPU: CUDA error: an illegal memory access" in said
    assert "the first error" in said


def test_failures_are_told_at_once(tmp_path: Path) -> None:
    said = run(tmp_path, "-p", "no:xdist", "-k", "4", stop_at="1e12")
    assert said.count("an ordinary error") > 1
    assert said.index("AssertionError: an ordinary error") < said.index("= FAILURES =")


def test_no_time_is_left(tmp_path: Path) -> None:
    said = run(tmp_path, "-p", "no:xdist", "-rs", stop_at="1", status=0)
    assert "6 skipped" in said
    assert "no time is left" in said
