"""What becomes of memory that is freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt, from malloc.h
COMMAND_BLOCKS = 32 * 2**20  # bytes; the most that glibc's own limit grows to


def keep_freed_memory(blocks: int | None = None) -> bool:
    """From now on memory that is freed stays with the process; False where C is not glibc's.

    By default glibc gives large blocks back to the system when they are freed, and a call pays
    for the pages of its results, more than many a kernel takes; how much depends on what was
    freed before it too. ``blocks``: those of more bytes are given back still.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    large = mallopt(_M_MMAP_MAX, 0) if blocks is None else mallopt(_M_MMAP_THRESHOLD, blocks)
    return bool(large and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
