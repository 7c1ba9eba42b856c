"""Compiled kernels stay on disk: another process makes its first call without compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rowmax.kernels import dispatch

SCRIPT = """
import time
import torch
from rowmax.kernels import Causal, attention

q = torch.randn(1, 2, 40, 16)
start = time.process_time()
attention(q, q, q, Causal(), backend="numba")
print(time.process_time() - start)
"""


def first_call(cache: Path) -> float:
    """Seconds of the first attention call in a fresh process with its kernels in `cache`.

    Of the process's own time, import of Numba included, so that a busy machine does not count.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"ROWMAX_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    dispatch.unavailable("numba") is not None, reason=f"numba: {dispatch.unavailable('numba')}"
)
def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    cold = first_call(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert kept, "nothing was kept in ROWMAX_CACHE_DIR"
    warm = min(first_call(tmp_path) for _ in range(3))
    assert warm < 1.0, f"first call in a second process: {warm:.2f} s; in the first: {cold:.2f} s"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == kept, "a second process compiled again"
