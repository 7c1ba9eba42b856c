"""How Python hands a kernel its arguments: one record, whose fields `call_records` defines.

Inside the kernel the record's fields are read by name. The last two are zeros that carry types:
`zero` of the type that is computed in, `item` of the type that the tensors hold. They make the
records of two dtypes two types, and so two compilations of one kernel.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch

from ..cpu_common.call_records import REAL, Field
from . import threads
from .jit import jit, machine_function

# The types of `zero` and of `item`, by the tensors' dtype; the half types as in `memory.py`.
_ELEMENTS = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.float32, np.uint16),
    torch.float16: (np.float32, np.int16),
}

# What is set for each run: addresses of the counters and of memory for each thread, of which it has
# `scratch_bytes`, and those of the memory that the threads share, first the part that is zeroed.
_HEAD = ("work_counter", "scratch", "scratch_bytes")
_SHARED = ("shared_zeros", "shared_memory")


class Kernel:
    """A kernel `void kernel(record *)` with its record's fields."""

    def __init__(self, kernel: Callable[..., None], fields: Sequence[Field]) -> None:
        self.kernel = kernel
        shared = tuple(field.name for field in fields if field.shared)
        shared = (*_SHARED[: len(_SHARED) - len(shared)], *shared)
        set_by_run = {*_HEAD, *shared}
        given = [field for field in fields if field.name not in set_by_run]
        self.names = tuple(field.name for field in given)
        self._values: Callable[..., tuple[float, ...]] = operator.itemgetter(*self.names)
        self._functions: dict[torch.dtype, int] = {}
        # the counters, all zero, and behind them the record
        types = "".join("d" if field.type == REAL else "q" for field in given)
        head = (*_HEAD, *shared)
        self._struct = struct.Struct(f"{threads.COUNTERS + 8 * len(head)}x{types}2d")
        self._records = {
            dtype: numba.from_dtype(
                np.dtype(
                    [(name, np.int64) for name in head]
                    + [(f.name, np.float64 if f.type == REAL else np.int64) for f in given]
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
        fields: Mapping[str, float],
        shared_bytes: int = 0,
        shared_zeros: int = 0,
    ) -> Plan:
        """A call with `scratch_bytes` of memory for each thread, which may be run many times.

        `fields` has the record's integers, addresses and real numbers by name. Of the
        `shared_bytes` that all threads share, the first `shared_zeros` are zeroed.
        """
        function = self._functions.get(dtype)
        if function is None and tasks > 0:
            function = self.compile(dtype)
        try:
            values = self._values(fields)
        except KeyError:
            values = ()
        if len(values) != len(fields):
            wrong = ", ".join(sorted(fields.keys() ^ set(self.names)))
            raise TypeError(f"{self.kernel.__name__}: fields missing or unknown: {wrong}")
        record = self._struct.pack(*values, 0.0, 0.0)
        sizes = (_round_up(scratch_bytes), _round_up(shared_bytes), shared_zeros)
        return Plan(function or 0, tasks, record, *sizes)

    def compile(self, dtype: torch.dtype) -> int:
        """Its machine function for tensors of `dtype`, by its address."""
        name = str(dtype).removeprefix("torch.")
        function = machine_function(self.kernel, self._records[dtype], name)
        self._functions[dtype] = function
        return function


class Plan(NamedTuple):
    """One call of a kernel, ready but for the memory that it works in."""

    function: int
    tasks: int
    record: bytes
    scratch_bytes: int
    shared_bytes: int
    shared_zeros: int

    def run(self, *addresses: int) -> None:
        """Run on as many threads as there are tasks, with `addresses` as the first fields."""
        if self.tasks == 0:
            return
        count = threads.thread_count(self.tasks)
        space = threads.take_workspace()
        try:
            shared = space.scratch(self.shared_bytes + count * self.scratch_bytes)
            if self.shared_zeros:
                ctypes.memset(shared, 0, self.shared_zeros)
            start, counters = space.header_start, space.header_address
            space.header[start : start + len(self.record)] = self.record
            _FIRST[len(addresses)].pack_into(
                *(space.header, start + threads.COUNTERS, counters),
                *(shared + self.shared_bytes, self.scratch_bytes),
                *(shared, shared + self.shared_zeros, *addresses),
            )
            threads.run(self.function, counters + threads.COUNTERS, count)
        finally:
            threads.give_back(space)


_FIRST = [struct.Struct(f"{len(_HEAD) + len(_SHARED) + count}q") for count in range(6)]


def _round_up(size: int) -> int:
    return (size + 63) & -64


@jit
def read(argument):
    """In a kernel: the record behind its pointer argument."""
    return numba.carray(argument, 1)[0]
