"""The common kernels of a dtype, compiled side by side, by a second Python on a free core.

A training step wants four kernels, one after the other; Numba compiles one at a time in a process.
So the first that has to be compiled begins a process of low priority that compiles the others,
those first that will be wanted last. The locks in `jit` divide the work: who wants a kernel that
the other is at waits for what it leaves on disk. Each dtype of a cache has one such process at a
time, however many programs want it (the ranks of a training): it is born with the dtype's lock and
has it to its end, and programs that find it taken begin none. ROWMAX_COMPILE_AHEAD=0 begins none.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch

VARIABLE = "ROWMAX_COMPILE_AHEAD"
# (module, kernel), in the order in which they are compiled here
COMMON = (
    ("attention_backward_kernels", "BACKWARD"),
    ("norm_backward", "BACKWARD"),
    ("attention_forward", "FORWARD"),
    ("norm_forward", "FORWARD"),
)
# Before anything is imported, the program's path: `-c` has the current folder in its own.
_SCRIPT = f"import sys; sys.path[:] = {{path}}; from {__name__} import main; main(*sys.argv[1:])"
_started: dict[str, subprocess.Popen[bytes]] = {}


def start(dtype: str, module: str, folder: Path) -> None:
    """Begin the process, if there is none yet: `module`'s kernel is compiled by the caller.

    folder: where all kernels' folders lie.
    """
    name = module.rpartition(".")[2]
    if dtype in _started or name not in dict(COMMON) or not _may():
        return
    path = [entry for entry in sys.path if isinstance(entry, str)]  # `import` ignores others
    script = _SCRIPT.format(path=ascii(path))
    try:
        lock = os.open(folder / f"ahead-{dtype}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return
    try:
        _take(lock)
        helper = _started[dtype] = subprocess.Popen(
            [sys.executable, "-c", script, dtype, name, str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {VARIABLE: "0"},
            start_new_session=True,  # what interrupts the program leaves it alone
            pass_fds=(lock,),
        )
        # A process that nobody waits for is a zombie once it ends. This program may end before it.
        threading.Thread(target=helper.wait, name="rowmax-compile-ahead", daemon=True).start()
    except (OSError, RuntimeError):
        return  # another process is at it; or there are no locks, processes or threads to be had
    finally:
        os.close(lock)  # the helper's own is open


def _take(lock: int) -> None:
    """Lock the open file for all who inherit it, until the last of them closes it or ends.

    Raises BlockingIOError where somebody else has it.
    """
    import fcntl  # not where there is no sched_getaffinity

    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _may() -> bool:
    """Whether that is wanted, this program is a Python, and a core is free."""
    if os.environ.get(VARIABLE, "1") == "0" or getattr(sys, "frozen", False):
        return False
    if not Path(sys.executable or "").name.startswith("python"):
        return False  # an interpreter in another program, which would be begun again
    try:
        return os.getloadavg()[0] + 1 <= len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return False


def main(dtype: str, module: str, lock: str) -> None:
    """In that process: compile the common kernels, but for `module`'s."""
    os.nice(10)
    try:
        _take(int(lock))  # had already, but where a network's file system knows no inheritance
    except OSError:
        return
    for name, kernel in COMMON:
        if name != module:
            found = importlib.import_module(f".{name}", __package__)
            getattr(found, kernel).compile(getattr(torch, dtype))
