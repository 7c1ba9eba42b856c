"""How Python hands a kernel its arguments: one record of int64 and float64 fields.

Inside the kernel the record's fields are read by name. The last two are zeros that carry types:
`zero` of the type that is computed in, `item` of the type that the tensors hold. They make the
records of two dtypes two types, and so two compilations of one kernel.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

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

    def plan(
        self,
        dtype: torch.dtype,
        tasks: int,
        scratch_bytes: int,
        integers: Sequence[int],
        reals: Sequence[float] = (),
        shared_bytes: int = 0,
        shared_zeros: int = 0,
    ) -> Plan:
        """A call with `scratch_bytes` of memory for each thread, which may be run many times.

        Of the `shared_bytes` that all threads share, the first `shared_zeros` are zeroed.
        """
        function = self._functions.get(dtype)
        if function is None and tasks > 0:
            function = machine_function(self.kernel, self._records[dtype])
            self._functions[dtype] = function
        record = self._struct.pack(*(0,) * len(_HEAD), *integers, *reals, 0.0, 0.0)
        sizes = (_round_up(scratch_bytes), _round_up(shared_bytes), shared_zeros)
        return Plan(function or 0, tasks, record, *sizes)

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
        """Run such a call."""
        sizes = (shared_bytes, shared_zeros)
        self.plan(dtype, tasks, scratch_bytes, integers, reals, *sizes).run()


class Plan(NamedTuple):
    """One call of a kernel, ready but for the memory that it works in."""

    function: int
    tasks: int
    record: bytes
    scratch_bytes: int
    shared_bytes: int
    shared_zeros: int

    def run(self, *addresses: int) -> None:
        """Run on as many threads as there are tasks, with `addresses` as the first integers."""
        if self.tasks == 0:
            return
        count = threads.thread_count(self.tasks)
        space = threads.take_workspace()
        try:
            shared = space.scratch(self.shared_bytes + count * self.scratch_bytes)
            if self.shared_zeros:
                ctypes.memset(shared, 0, self.shared_zeros)
            start, tickets = space.header_start, space.header_address
            space.header[start : start + len(self.record)] = self.record
            _FIRST[len(addresses)].pack_into(
                *(space.header, start + threads.TICKETS, tickets, shared),
                *(shared + self.shared_bytes, self.scratch_bytes, *addresses),
            )
            threads.run(self.function, tickets + threads.TICKETS, count)
        finally:
            threads.give_back(space)


_FIRST = [struct.Struct(f"{len(_HEAD) + count}q") for count in range(6)]


def _round_up(size: int) -> int:
    return (size + 63) & -64


@jit
def read(argument):
    """In a kernel: the record behind its pointer argument."""
    return numba.carray(argument, 1)[0]
