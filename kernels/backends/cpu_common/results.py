"""Memory for large results, in huge pages where the system offers them (Linux).

A large tensor's memory is new to the process each time, and its first touch costs a page fault
every 4 KiB, often more than the computation. NumPy asks the system the same for its arrays.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

from torch import Tensor

from .constants import ADVISED_BYTES


def new_result(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised contiguous tensor of like's dtype and device."""
    result = like.new_empty(shape)
    if result.nbytes >= ADVISED_BYTES:
        advise = _madvise()
        if advise is not None:
            # Only whole pages can be advised; what the system answers changes nothing but speed.
            start = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (result.data_ptr() + result.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            advise(start, end - start, mmap.MADV_HUGEPAGE)
    return result


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
