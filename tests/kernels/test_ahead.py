"""Common kernels are compiled by a second process: when it is begun, and what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from rowmax.kernels.backends import dispatch

from ..processes import printed

pytestmark = pytest.mark.skipif(
    dispatch.unavailable("numba") is not None, reason=f"numba: {dispatch.unavailable('numba')}"
)
POPEN = subprocess.Popen
FORWARD = "rowmax.kernels.backends.cpu_numba.attention_forward"


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, as in a Python with a free core, and with what it begins noted."""
    from rowmax.kernels.backends.cpu_numba import ahead

    begun: list[list[str]] = []

    def begin(command: list[str], **_: Any) -> Any:
        begun.append(command)
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.delenv("ROWMAX_COMPILE_AHEAD", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 9.0, 9.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(ahead, "_started", {})
    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setattr(ahead, "begun", begun, raising=False)
    return ahead


def test_one_is_begun_for_each_dtype(ahead: Any, tmp_path: Path) -> None:
    for dtype in ("float32", "float32", "bfloat16", "float32"):
        ahead.start(dtype, FORWARD, tmp_path)
    assert [command[-3:-1] for command in ahead.begun] == [
        ["float32", "attention_forward"],
        ["bfloat16", "attention_forward"],
    ]


def test_none_is_begun_for_a_kernel_that_is_not_common(ahead: Any, tmp_path: Path) -> None:
    ahead.start("float32", "rowmax.kernels.backends.cpu_numba.attention_decode", tmp_path)
    assert not ahead.begun


def test_none_is_begun_beside_another_process_s(ahead: Any, tmp_path: Path) -> None:
    with FileLock(tmp_path / "ahead-float32.lock"):
        ahead.start("float32", FORWARD, tmp_path)
    assert not ahead.begun


def test_one_works_for_a_dtype_of_a_cache_at_a_time(
    ahead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first moment, when it has imported nothing yet."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(_: list[str], **options: Any) -> subprocess.Popen[bytes]:
        begun.append(POPEN(["sleep", "600"], **options))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", begin)
    try:
        for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
            ahead.start(dtype, FORWARD, tmp_path)
            ahead._started.clear()  # as in another rank
        assert len(begun) == 2
        begun[0].kill()
        begun[0].wait()
        for dtype in ("bfloat16", "float32"):
            ahead.start(dtype, FORWARD, tmp_path)
        assert len(begun) == 3
        assert list(ahead._started) == ["float32"]
    finally:
        for process in begun:
            process.kill()


def test_it_ends_where_another_has_the_lock_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that lets no child inherit it."""
    from rowmax.kernels.backends.cpu_numba import ahead

    monkeypatch.setattr(os, "nice", lambda _: 0)
    monkeypatch.setattr(ahead, "COMMON", (("no_such_module", "KERNEL"),))
    path = tmp_path / "ahead.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with FileLock(path):
            ahead.main("float32", "attention_forward", str(descriptor))
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            ahead.main("float32", "attention_forward", str(descriptor))
    finally:
        os.close(descriptor)


def test_none_is_begun_where_locks_can_not_be(ahead: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ahead.start("float32", FORWARD, tmp_path / "file")
    assert not ahead.begun


def test_a_process_that_can_not_be_had_is_no_error(
    ahead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no memory for a process")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    ahead.start("float32", FORWARD, tmp_path)


def test_it_imports_by_the_program_s_path_alone(
    ahead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the folder that the program runs in; entries that no import reads are no error."""
    own = [*sys.path, "a {folder}'s \u00e4"]
    monkeypatch.setattr(sys, "path", [tmp_path, *own])
    (tmp_path / "json.py").write_text("print('of the current folder')")
    (tmp_path / "filelock.py").write_text("print('of the current folder')")
    ahead.start("float32", FORWARD, tmp_path)
    ((_, _, script, *arguments),) = ahead.begun
    monkeypatch.undo()
    script = f"{script.partition('; from ')[0]}; import filelock, json; print(ascii(sys.path))"
    assert printed("-c", script, *arguments, cwd=tmp_path) == f"{own!a}\n"


def test_a_process_that_ended_is_no_zombie(
    ahead: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: Any, **__: Any) -> Any:
        return POPEN(["true"])

    monkeypatch.setattr(subprocess, "Popen", begin)
    ahead.start("float32", FORWARD, tmp_path)
    (helper,) = ahead._started.values()
    end = time.monotonic() + 30
    while helper.returncode is None and time.monotonic() < end:  # set by who waits for it
        time.sleep(0.01)
    assert helper.returncode == 0


@pytest.mark.parametrize(
    "owner,name,value",
    [
        (os.environ, "ROWMAX_COMPILE_AHEAD", "0"),
        (os, "sched_getaffinity", lambda _: {3}),
        (os, "getloadavg", lambda: (1.5, 0.0, 0.0)),
        (os, "getloadavg", None),
        (sys, "frozen", True),
        (sys, "executable", "/opt/app/server"),
        (sys, "executable", None),
    ],
)
def test_none_is_begun(
    ahead: Any, owner: Any, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if owner is os.environ:
        monkeypatch.setenv(name, value)
    elif value is None and owner is os:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value, raising=False)
    ahead.start("float32", FORWARD, tmp_path)
    assert not ahead.begun


SCRIPT = """
import os

os.getloadavg = lambda: (0.0, 0.0, 0.0)
os.sched_getaffinity = lambda _: {0, 1}

import torch
from rowmax.kernels import layer_norm
from rowmax.kernels.backends.cpu_numba import ahead

ahead.COMMON = (("norm_backward", "BACKWARD"), ("norm_forward", "FORWARD"))
ahead._SCRIPT = ahead._SCRIPT.replace("main(*", f"ahead.COMMON = {ahead.COMMON}; main(*").replace(
    "import main", "import main; from rowmax.kernels.backends.cpu_numba import ahead"
)
x = torch.randn(3, 8, dtype=torch.float64)
layer_norm(x, backend="numba")
(helper,) = ahead._started.values()
print(helper.wait())
"""


@pytest.mark.slow
def test_the_process_leaves_the_other_kernel_on_disk(tmp_path: Path) -> None:
    """Of two kernels, to be quick; the program itself wanted the forward pass alone."""
    assert printed("-c", SCRIPT, ROWMAX_CACHE_DIR=str(tmp_path), ROWMAX_COMPILE_AHEAD="1") == "0\n"
    kept = sorted(path.name.partition("-")[0] for path in tmp_path.rglob("*.nbc"))
    assert kept == ["norm_backward.backward", "norm_forward.forward"]
    assert len(list(tmp_path.rglob("ahead-float64.lock"))) == 1


def test_what_is_common_is_there(ahead: Any) -> None:
    """Each module has the kernel, and it is one that compiles by dtype."""
    from rowmax.kernels.backends.cpu_numba.call import Kernel

    for module, kernel in ahead.COMMON:
        found = __import__(f"{ahead.__package__}.{module}", fromlist=[kernel])
        assert isinstance(getattr(found, kernel), Kernel)
