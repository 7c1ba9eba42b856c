"""Compiled kernels stay on disk: another process makes its first call without compiling."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from rowmax.kernels.backends import dispatch

from ..processes import printed, python

NEEDS_NUMBA = pytest.mark.skipif(
    dispatch.unavailable("numba") is not None, reason=f"numba: {dispatch.unavailable('numba')}"
)

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
    return float(printed("-c", SCRIPT, ROWMAX_CACHE_DIR=str(cache)))


def _raise_by_one(at: Any) -> None:
    at[0] += 1


@NEEDS_NUMBA
def test_two_threads_leave_numbas_own_folder_as_it_was(tmp_path: Path) -> None:
    from numba.core import config

    from rowmax.kernels.backends.cpu_numba import jit

    before, inside = config.CACHE_DIR, threading.Event()

    def second() -> None:
        inside.wait()
        with jit._cache_in(tmp_path / "second"):
            pass

    thread = threading.Thread(target=second)
    thread.start()
    with jit._cache_in(tmp_path / "first"):
        inside.set()
        thread.join(0.2)
        assert str(tmp_path / "first") == config.CACHE_DIR
    thread.join()
    assert before == config.CACHE_DIR


@NEEDS_NUMBA
def test_processes_that_compile_different_signatures_share_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a lock of its own, and Numba's index of a folder is written without one."""
    from numba import types

    from rowmax.kernels.backends.cpu_numba import jit

    monkeypatch.setenv("ROWMAX_CACHE_DIR", str(tmp_path))
    for argument in (types.float32, types.float64):
        jit.machine_function(_raise_by_one, argument)
    indices = list(tmp_path.rglob("*.nbi"))
    assert len(indices) == 2
    assert all(len(list(index.parent.glob("*.nbc"))) == 1 for index in indices)


@pytest.mark.slow
@NEEDS_NUMBA
def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    from rowmax.kernels.backends.cpu_numba import jit
    from rowmax.kernels.backends.cpu_numba.attention_forward import FORWARD

    own = jit.cache_directory(FORWARD.kernel)
    first_call(own.parent)  # compiled now, or by another test: it is the same cache
    copy = tmp_path / own.name  # to which no other process writes
    shutil.copytree(own, copy)
    kept = {path: path.stat().st_mtime_ns for path in copy.rglob("*.nb*")}
    assert kept, f"nothing was kept in {own}"
    warm = min(first_call(tmp_path) for _ in range(3))
    assert warm < 1.0, f"first call in a second process: {warm:.2f} s"
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*.nb*")}
    assert after == kept, "a second process compiled again"


KERNEL = "def kernel(record):\n    x = record[0]\n" + "    x = (x * 3) ^ (x >> 1)\n" * 100
RACE = """
import sys
import time
from numba import types
from rowmax.kernels.backends.cpu_numba import jit
import slow_kernel

print("ready", flush=True)
sys.stdin.readline()
jit.machine_function(slow_kernel.kernel, types.int64)
print(jit._kept_alive[-1].cache_hits)
"""


@NEEDS_NUMBA
def test_of_two_processes_one_compiles(tmp_path: Path) -> None:
    (tmp_path / "slow_kernel.py").write_text(KERNEL + "    record[0] = x\n", "utf-8")
    environment = os.environ | {"ROWMAX_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", RACE],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    hits = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(hits) == ["0\n", "1\n"]


def doubled(record):
    """A kernel: compiled by itself in a moment."""
    record[0] = 2 * record[0]


def run_doubled(jit) -> int:
    """21 doubled by the machine function that `jit` makes now."""
    from numba import types

    jit.machine_function.cache_clear()
    address = jit.machine_function(doubled, types.int64)
    number = ctypes.c_int64(21)
    ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))(address)(number)
    return number.value


@NEEDS_NUMBA
@pytest.mark.parametrize("trouble", ["no home", "a file in its place", "a full disk"])
def test_without_a_usable_directory_kernels_are_compiled_all_the_same(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba.core import caching

    from rowmax.kernels.backends.cpu_numba import jit

    monkeypatch.setattr(jit, "_uncached", [])
    monkeypatch.setenv("ROWMAX_CACHE_DIR", str(tmp_path / "cache"))
    reason = "Not a directory"
    if trouble == "no home":
        for name in ("ROWMAX_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
            monkeypatch.delenv(name, raising=False)

        def nobody(user: int) -> None:
            raise KeyError(user)

        monkeypatch.setattr("pwd.getpwuid", nobody)
        reason = "this user has no home directory"
    elif trouble == "a file in its place":
        (tmp_path / "cache").write_text("")
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
        reason = "No space left on device"
    with pytest.warns(RuntimeWarning, match=f"can't be kept on disk .*{reason}"):
        assert run_doubled(jit) == 42
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        assert run_doubled(jit) == 42
    jit.machine_function.cache_clear()


@NEEDS_NUMBA
@pytest.mark.parametrize("value, announced", [("0", 1), ("1", 0)])
def test_compiling_is_announced_and_reading_is_not(
    value: str,
    announced: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from rowmax.kernels.backends.cpu_numba import jit

    monkeypatch.setenv("ROWMAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ROWMAX_QUIET", value)
    for _ in range(2):  # compiled, then read from disk
        assert run_doubled(jit) == 42
    told = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    text = "rowmax: Numba compiles test_cache, once: about 2 s"
    assert told == [("rowmax", "WARNING", text)] * announced
    jit.machine_function.cache_clear()


@NEEDS_NUMBA
@pytest.mark.parametrize("seconds", [0.2, 1.2])
def test_who_waits_too_long_compiles_its_own(
    seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For a process that was stopped, say; the next kernels are kept as before."""
    from numba import types

    from rowmax.kernels.backends.cpu_numba import jit

    monkeypatch.setattr(jit, "_uncached", [])
    monkeypatch.setattr(jit, "PATIENCE", seconds)
    monkeypatch.setenv("ROWMAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ROWMAX_QUIET", "0")
    signature = str(types.void(types.CPointer(types.int64)))
    directory = jit.cache_directory(doubled)
    directory.mkdir(parents=True)
    name = f"doubled-{hashlib.sha256(signature.encode()).hexdigest()[:16]}.lock"
    with FileLock(directory / name):
        assert run_doubled(jit) == 42
    assert [record.getMessage() for record in caplog.records] == [
        f"rowmax: another process compiles test_cache: waiting, at most {seconds:.0f} s",
        f"rowmax: another process did not compile test_cache in {seconds:.0f} s",
        "rowmax: Numba compiles test_cache, once in each process: about 2 s",
    ]
    assert not list(tmp_path.rglob("*.nbc"))
    assert run_doubled(jit) == 42
    assert caplog.messages[3:] == ["rowmax: Numba compiles test_cache, once: about 2 s"]
    assert len(list(tmp_path.rglob("*.nbc"))) == 1
    jit.machine_function.cache_clear()


@NEEDS_NUMBA
def test_a_function_is_compiled_with_its_kernel_alone(tmp_path: Path) -> None:
    """Once for all integers, and never by itself, which was half of the time."""
    script = """
import ctypes
from llvmlite.binding.executionengine import ExecutionEngine

compiled = []
finalize = ExecutionEngine.finalize_object
ExecutionEngine.finalize_object = lambda engine: (compiled.append(engine), finalize(engine))

from numba import types
from rowmax.kernels.backends.cpu_numba import jit

@jit.jit
def product(pair, number):
    return pair[0] * pair[1] * number

def kernel(record):
    record[0] = product((record[0], 2), 3) + product((1, record[0]), record[0])

def first(record):  # with what Numba needs once
    record[0] = record[0] * record[0] + 1

jit.machine_function(first, types.int64)
compiled.clear()
address = jit.machine_function(kernel, types.int64)
number = ctypes.c_int64(5)
ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))(address)(number)
print(number.value, len(compiled), len(product.overloads))
"""
    path = tmp_path / "script.py"
    path.write_text(script, "utf-8")
    done = python(str(path), ROWMAX_CACHE_DIR=str(tmp_path), ROWMAX_QUIET="1")
    assert (done.stdout, done.stderr) == ("55 1 1\n", "")
