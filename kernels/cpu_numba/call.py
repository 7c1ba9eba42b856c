"""How Python hands a kernel its arguments: one record of int64 and float64 fields.

Inside the kernel the record's fields are read by name; its last field, `zero`, is a 0 of the
element type, which makes the float32 and the float64 record two types, and so two compilations of
one kernel.
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

_ELEMENTS = {torch.float32: np.float32, torch.float64: np.float64}


class Kernel:
    """A kernel `void kernel(record *)` with its record's fields.

    `integers` and `reals` name the fields in order; `tickets` and `scratch`, the addresses of eight
    zeroed counters and of the threads' memory, and `scratch_bytes`, each thread's share of it,
    come first in every record.
    """

    def __init__(
        self, kernel: Callable[..., None], integers: Sequence[str], reals: Sequence[str]
    ) -> None:
        self.kernel = kernel
        self.integers = tuple(integers)
        self.reals = tuple(reals)
        self._functions: dict[torch.dtype, int] = {}
        self._struct = struct.Struct(f"{3 + len(self.integers)}q{len(self.reals)}dd")
        self._records = {
            dtype: numba.from_dtype(
                np.dtype(
                    [("tickets", np.int64), ("scratch", np.int64), ("scratch_bytes", np.int64)]
                    + [(name, np.int64) for name in self.integers]
                    + [(name, np.float64) for name in self.reals]
                    + [("zero", element)]
                )
            )
            for dtype, element in _ELEMENTS.items()
        }

    def __call__(
        self,
        dtype: torch.dtype,
        tasks: int,
        scratch_bytes: int,
        integers: Sequence[int],
        reals: Sequence[float] = (),
    ) -> None:
        """Run on as many threads as there are tasks, with `scratch_bytes` of memory for each."""
        if tasks == 0:
            return
        function = self._functions.get(dtype)
        if function is None:
            function = machine_function(self.kernel, self._records[dtype])
            self._functions[dtype] = function
        count = threads.thread_count(tasks)
        scratch_bytes = -(-scratch_bytes // 64) * 64
        tickets, scratch = threads.workspace(count, scratch_bytes)
        record = ctypes.create_string_buffer(
            self._struct.pack(tickets, scratch, scratch_bytes, *integers, *reals, 0.0)
        )
        threads.run(function, ctypes.addressof(record), count)


@jit
def read(argument):
    """In a kernel: the record behind its pointer argument."""
    return numba.carray(argument, 1)[0]
