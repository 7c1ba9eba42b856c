"""How Python hands a kernel its arguments: one record of int64 and float64 fields.

Inside the kernel the record's fields are read by name. The last two are zeros that carry types:
`zero` of the type that is computed in, `item` of the type that the tensors hold. They make the
records of two dtypes two types, and so two compilations of one kernel.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch

from . import threads
from .jit import jit, machine_function

# The types of `zero` and of `item`, by the tensors' dtype; the half types as in `memory.py`.
_ELEMENTS = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.float32, np.uint16),
    torch.float16: (np.float32, np.int16),
}

_HEAD = ("tickets", "shared", "scratch", "scratch_bytes")


class Kernel:
    """A kernel `void kernel(record *)` with its record's fields.

    `integers` and `reals` name the fields in order. First in every record come `tickets`, `shared`
    and `scratch`, the addresses of eight zeroed counters, of memory that the threads share and of
    memory for each of them, and `scratch_bytes`, each thread's part of the latter.
    """

    def __init__(
        self, kernel: Callable[..., None], integers: Sequence[str], reals: Sequence[str]
    ) -> None:
        self.kernel = kernel
        self.integers = tuple(integers)
        self.reals = tuple(reals)
        self._functions: dict[torch.dtype, int] = {}
        # the tickets, all zero, and behind them the record
        self._struct = struct.Struct(
            f"{threads.TICKETS}x{len(_HEAD) + len(self.integers)}q{len(self.reals)}d2d"
        )
        self._records = {
            dtype: numba.from_dtype(
                np.dtype(
                    [(name, np.int64) for name in (*_HEAD, *self.integers)]
                    + [(name, np.float64) for name in self.reals]
                    + [("zero", computed), ("item", stored)]
                )
            )
            for dtype, (computed, stored) in _ELEMENTS.items()
        }
        assert self._struct.size <= threads.HEADER

    def __call__(
        self,
        dtype: torch.dtype,
        tasks: int,
        scratch_bytes: int,
        integers: Sequence[int],
        reals: Sequence[float] = (),
        shared_bytes: int = 0,
        shared_zeros: int = 0,
    ) -> None:
        """Run on as many threads as there are tasks, with `scratch_bytes` of memory for each.

        Of the `shared_bytes` that all threads share, the first `shared_zeros` are zeroed.
        """
        if tasks == 0:
            return
        function = self._functions.get(dtype)
        if function is None:
            function = machine_function(self.kernel, self._records[dtype])
            self._functions[dtype] = function
        count = threads.thread_count(tasks)
        scratch_bytes = (scratch_bytes + 63) & -64
        space = threads.take_workspace()
        try:
            tickets = space.header_address
            shared_bytes = (shared_bytes + 63) & -64
            shared = space.scratch(shared_bytes + count * scratch_bytes)
            if shared_zeros:
                ctypes.memset(shared, 0, shared_zeros)
            scratch = shared + shared_bytes
            self._struct.pack_into(
                *(space.header, space.header_start),
                *(tickets, shared, scratch, scratch_bytes, *integers, *reals, 0.0, 0.0),
            )
            threads.run(function, tickets + threads.TICKETS, count)
        finally:
            threads.give_back(space)


@jit
def read(argument):
    """In a kernel: the record behind its pointer argument."""
    return numba.carray(argument, 1)[0]
