"""The kernels of csrc/ behind Numba's launches: each call goes to a program that knows no torch.

`runner.cpp` has the kernels of every instruction set. A launch of `cpu_numba` fills a record by
name, as `call_records.py` defines it for both backends; here the record is sent to the program
instead of Numba's machine code, with the memory of the tensors that it names, and what the kernel
wrote comes back. So cases are drawn, called, differentiated and judged as those of any backend.

Tiles, chunks, tasks and threads are drawn anew for each call; results lie in memory with gaps, and
everything has guards before and behind it: what is written beyond the elements is a fault.
"""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rowmax.bench.verification.implementations import Backend
from rowmax.kernels.backends.cpu_common import call_records
from rowmax.kernels.backends.cpu_common.call_records import (
    ATTENTION,
    CROSS_ENTROPY,
    NORM,
    SOFTMAX,
    Field,
)
from rowmax.kernels.backends.cpu_common.constants import BLOCK_KEYS, ITEM_COMPUTED
from rowmax.kernels.backends.cpu_numba import (
    attention_backward_kernels,
    attention_decode,
    attention_forward,
    attention_launch,
    cross_entropy,
    norm_backward,
    norm_forward,
    norm_launch,
    softmax,
    softmax_launch,
)
from rowmax.kernels.backends.cpu_numba.attention_plan import max_decode_queries
from rowmax.kernels.backends.cpu_numba.call import Kernel
from rowmax.kernels.ops.layout import statistics_dtype

KERNELS: dict[Kernel, tuple[str, tuple[Field, ...]]] = {
    attention_forward.FORWARD: ("attention_forward", ATTENTION.fields("forward")),
    attention_decode.DECODE: ("attention_decode", ATTENTION.fields("decode")),
    attention_backward_kernels.BACKWARD: ("attention_backward", ATTENTION.fields("backward")),
    norm_forward.FORWARD: ("norm_forward", NORM.fields("forward")),
    norm_backward.BACKWARD: ("norm_backward", NORM.fields("backward")),
    cross_entropy.ROWS: ("cross_entropy", CROSS_ENTROPY.fields("rows")),
    softmax.FORWARD: ("softmax_forward", SOFTMAX.fields("forward")),
    softmax.BACKWARD: ("softmax_backward", SOFTMAX.fields("backward")),
}
ITEMS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as the program counts them
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FILLING = 0xFF  # of bytes: NaN in every float type, -1 in every integer


class RunnerError(Exception):
    """The program has ended."""


class Runner:
    """A process of the program, in the form that the environment chooses."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment = command, environment
        self.start()

    def __str__(self) -> str:
        pairs = ", bfloat16 dot products" if self.pairs else ""
        return f"vectors of {8 * self.vector_bytes} bits{pairs}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment
        )
        self.vector_bytes, self.vectors, pairs = struct.unpack("3q", self._read(24))
        self.pairs = bool(pairs)

    def stop(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def run(
        self,
        kernel: str,
        item: int,
        threads: int,
        fields: Mapping[str, tuple[int, bytes]],
        buffers: Sequence[bytes],
    ) -> list[bytes]:
        """The buffers after the call; a field is a buffer and an offset, or -1 and its value."""
        request = [b"+", struct.pack("q", len(buffers))]
        for buffer in buffers:
            request += [struct.pack("q", len(buffer)), buffer]
        request.append(struct.pack("32sqqq", kernel.encode(), item, threads, len(fields)))
        for name, (of, value) in fields.items():
            request.append(struct.pack("32sq8s", name.encode(), of, value))
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # said by `_read`
            self.process.stdin.write(b"".join(request))
            self.process.stdin.flush()
        (damaged,) = struct.unpack("q", self._read(8))
        after = [self._read(len(buffer)) for buffer in buffers]
        if damaged >= 0:
            raise AssertionError(f"{kernel}: memory beyond a tensor's ends is written to")
        return after

    def _read(self, count: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise RunnerError(f"the program ended with status {self.process.wait()}")
        return data


class Launches(Backend):
    """Numba's launches, with a runner in the place of its kernels."""

    def __init__(self) -> None:
        super().__init__("numba")
        self.batch_start = 0  # that dropout counts from
        self._known: dict[int, Tensor] = {}  # by address
        self._spaced: dict[int, Tensor] = {}  # the results with gaps, by address
        Kernel.plan = partial_method(self._plan)  # type: ignore[method-assign]
        Tensor.data_ptr = partial_method(self._data_ptr)  # type: ignore[method-assign]
        for module, name, own in (
            (attention_launch, "_plan_name", lambda problem: None),  # no plan is kept
            (attention_launch, "max_decode_queries", self._max_decode_queries),
            (attention_launch, "empty_heads", self._empty_heads),
            (norm_launch, "new_result", self._new_result),
            (softmax_launch, "new_result", self._new_result),
        ):
            setattr(module, name, own)

    def use(self, runner: Runner, seed: int, batch_start: int) -> None:
        """Run what follows there, divided as `seed` says."""
        self.runner, self.random, self.batch_start = runner, random.Random(seed), batch_start
        self._known.clear()
        self._spaced.clear()

    # --- what launches ask for --------------------------------------------------------------------

    def _data_ptr(self, tensor: Tensor) -> int:
        address = torch._C.TensorBase.data_ptr(tensor)
        self._known[address] = tensor
        return address

    def _new_result(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        return like.new_full(tuple(shape), torch.nan)

    def _empty_heads(self, like: Tensor, dim: int) -> Tensor:
        """(B, H, L, dim) in memory with heads or rows first, and NaN between and around rows."""
        batch, heads, length, _ = like.shape
        row, start = dim + self.random.randint(0, 3), self.random.randint(0, 3)
        elements = start + batch * heads * length * row + self.random.randint(0, 3)
        memory = torch.full((elements * like.itemsize,), FILLING, dtype=torch.uint8)
        strides = self.random.choice(((length * row, row), (row, heads * row)))
        by_dimension = (heads * length * row, *strides, 1)
        tensor = memory.view(like.dtype).as_strided((*like.shape[:3], dim), by_dimension, start)
        self._spaced[torch._C.TensorBase.data_ptr(tensor)] = tensor
        return tensor

    def _max_decode_queries(self, heads: int, key_heads: int) -> int:
        """Sometimes tiles take what is meant for the decoding kernel."""
        return max_decode_queries(heads, key_heads) if self.random.random() < 0.7 else 0

    def _plan(
        self,
        kernel: Kernel,
        dtype: torch.dtype,
        tasks: int,
        _scratch_bytes: int,
        fields: Mapping[str, float],
        *_shared: int,
    ) -> Any:
        assert fields.keys() == set(kernel.names)
        run = partial(self._run, kernel, dtype, dict(fields)) if tasks > 0 else lambda: None
        return SimpleNamespace(run=run)

    # --- the call ---------------------------------------------------------------------------------

    def _run(self, kernel: Kernel, dtype: torch.dtype, given: dict[str, Any]) -> None:
        name, definition = KERNELS[kernel]
        shared = self._divided(name, statistics_dtype(dtype), given)
        buffers: list[bytes] = []
        sent: dict[str, tuple[int, bytes]] = {}
        storages: dict[int, tuple[int, Tensor]] = {}  # the buffer that a storage is, and its bytes
        written: set[int] = set()
        for field in definition:
            if field.name in shared:
                sent[field.name] = len(buffers), bytes(8)
                buffers.append(shared[field.name])
            elif field.name not in given:
                continue
            elif field.type.endswith("*") and given[field.name] != 0:
                address = given[field.name]
                storage = self._known[address].untyped_storage()
                start = storage.data_ptr()
                if start not in storages:
                    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                    storages[start] = len(buffers), memory
                    buffers.append(memory.numpy().tobytes())
                sent[field.name] = storages[start][0], struct.pack("q", address - start)
                if not field.type.startswith("const"):
                    written.add(start)
            else:
                kind = "d" if field.type == call_records.REAL else "q"
                sent[field.name] = -1, struct.pack(kind, given[field.name])
        threads = self.random.randint(1, 3)
        after = self.runner.run(name, ITEMS.index(dtype), threads, sent, buffers)
        for start, (buffer, memory) in storages.items():
            if start in written:
                memory.copy_(torch.frombuffer(bytearray(after[buffer]), dtype=torch.uint8))
            elif after[buffer] != buffers[buffer]:
                raise AssertionError(f"{name}: a tensor that is only read is written to")
        self._require_gaps(name, [given[f.name] for f in definition if f.name in given])

    def _require_gaps(self, name: str, values: Sequence[float]) -> None:
        for address in self._spaced.keys() & set(values):
            tensor = self._spaced[int(address)]
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()
            integers = whole.view(INTEGERS[tensor.itemsize])
            integers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(-1)
            if not (whole == FILLING).all():
                raise AssertionError(f"{name}: memory between the rows of a tensor is written to")

    def _divided(self, name: str, dtype: torch.dtype, of: dict[str, Any]) -> dict[str, bytes]:
        """Sets the fields that say how work is divided; the memory that threads share for it."""
        draw, lanes = self.random.randint, self.runner.vector_bytes // dtype.itemsize
        if of.get("dropout") and "batch_start" in of:
            of["batch_start"] = self.batch_start
        if "task_rows" in of:
            of["task_rows"] = draw(1, 8)
        if name == "norm_backward":
            of["chunk_rows"] = 4 * draw(1, 8)
            of["chunks"] = max(1, -(-of["rows"] // of["chunk_rows"]))
            padded = -(-of["columns"] // lanes) * lanes
            return {"partials": _filled(2 * of["chunks"] * padded * dtype.itemsize)}
        if name == "attention_decode":
            chunks_done = bytes(8 * of["batch"] * of["key_heads"])
            return {"chunks_done": chunks_done} if of["chunks"] > 1 else {}
        if name not in ("attention_forward", "attention_backward"):
            return {}
        of["tile"] = lanes * draw(1, self.runner.vectors)
        of["tasks_per_grab"] = draw(1, 3)
        if name == "attention_forward":
            widened = of["item_type"] != ITEM_COMPUTED and not self.runner.pairs
            of["keeps_wide"] = widened and bool(draw(0, 1))
            return {}
        blocks = max(1, -(-of["key_len"] // BLOCK_KEYS))
        one_column = of["d_bias"] != 0 and of["d_bias_column"] == 0
        chunk_blocks = blocks if one_column else draw(1, blocks)
        of["chunk_tasks"] = -(-blocks // chunk_blocks)
        of["chunk_keys"] = chunk_blocks * BLOCK_KEYS
        tasks = of["batch_tasks"], of["head_tasks"], of["chunk_tasks"]
        if tasks != (of["batch"], of["key_heads"], 1):
            of["tasks_per_grab"] = 1  # tasks that are heads are taken together, no others
        tiles = of["batch"] * of["heads"] * -(-of["query_len"] // of["tile"])
        accumulator = _filled(tiles * of["tile"] * of["head_dim"] * dtype.itemsize)
        return {"dq_semaphore": bytes(8 * tiles), "dq_accumulator": accumulator}


def _filled(count: int) -> bytes:
    return bytes([FILLING]) * count


def partial_method(function: Any) -> Any:
    """A method that passes its object on to a bound method of another one."""
    return lambda *arguments, **keywords: function(*arguments, **keywords)
