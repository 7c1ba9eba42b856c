"""How much memory a call takes at its peak, beyond what is there before it."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MARKS = Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Bytes, results included; None where the system can't tell.

    On a GPU what torch's allocator hands out. On the CPU the rise of the resident memory of the
    process, in pages, kernels' own scratch memory included where it is fresh; freed memory that
    the C library keeps is given back first, since what is taken again would not show.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    _give_back()
    try:
        forget_peak()
        before = _resident("VmRSS")
        result = call()
        peak = _resident("VmHWM") - before
    except OSError:
        return None
    del result
    return max(0, peak)


def forget_peak() -> None:
    """The most resident memory is counted from here on. Raises OSError where that can't be done."""
    # Linux resets the mark when 5 is written here.
    _MARKS.write_text("5", encoding="ascii")


def resident_bytes(*, at_peak: bool = False) -> int:
    """The process's resident memory, or the most of it so far (since `forget_peak`).

    Where the system tells only the most of it, that.
    """
    with contextlib.suppress(OSError):
        return _resident("VmHWM" if at_peak else "VmRSS")
    import resource  # of Unix

    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def _resident(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_STATUS} has no {key}")


def _give_back() -> None:
    """Returns freed memory to the system, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
