"""What the judge stands on, sealed: functions that a candidate replaced, settings that it changed.

A candidate runs in the judge's process, so it can reach all of it. The seal holds the clocks, what
times a GPU, torch's functions that peers and judge call, and everything of rowmax itself.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

_CLOCKS = (
    *("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "time_ns"),
    *("process_time", "process_time_ns", "thread_time", "clock_gettime", "sleep"),
)
_MODULES = ("rowmax.bench.", "rowmax.kernels")
_TORCH: tuple[tuple[str, Any], ...] = (
    ("torch", torch),
    ("torch.nn.functional", F),
    ("torch.autograd", torch.autograd),
    ("torch.cuda", torch.cuda),
    ("torch.testing", torch.testing),
)
_CLASSES: tuple[tuple[str, type], ...] = (
    ("torch.Tensor", torch.Tensor),
    ("torch.cuda.Event", torch.cuda.Event),
    ("torch.cuda.Stream", torch.cuda.Stream),
)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)


class Seal:
    """As it is now; `broken` tells what is different later."""

    def __init__(self) -> None:
        self._settings = _settings()
        self._functions = dict(_functions())

    def broken(self) -> str | None:
        """The first thing that is not as it was."""
        for name in _CLOCKS:
            clock = getattr(time, name, None)
            if clock is not None and not isinstance(clock, types.BuiltinFunctionType):
                return f"it replaced time.{name}"
        for name, value in _settings().items():
            if value != self._settings[name]:
                return f"it changed {name} from {self._settings[name]} to {value}"
        now = dict(_functions())
        for name, function in self._functions.items():
            if name in now and now[name] != function:
                return f"it replaced {name}"
        added = [n for n in now if n.startswith("torch.Tensor.") and n not in self._functions]
        return f"it added {added[0]}" if added else None


def _settings() -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch's number of threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
        "the grad mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "TF32 in products": torch.backends.cuda.matmul.allow_tf32,
        "the stack of function modes": torch._C._len_torch_function_stack(),
        "the stack of dispatch modes": torch._C._len_torch_dispatch_stack(),
        "denormal numbers": bool(torch.tensor(1e-310, dtype=torch.float64) * 0.5 > 0),
        "garbage collection": gc.isenabled(),
        "the interpreter's switch interval": sys.getswitchinterval(),
        "the trace function": sys.gettrace(),
        "the profile function": sys.getprofile(),
    }
    if hasattr(os, "sched_getaffinity"):
        found["the CPUs of the process"] = os.sched_getaffinity(0)
    return found


def _functions() -> Iterator[tuple[str, Any]]:
    for name, module in _TORCH:
        yield from _members(name, module)
    for name, some in _CLASSES:
        yield from _members(name, some)
    for name, module in tuple(sys.modules.items()):
        if name.startswith(_MODULES) and isinstance(module, types.ModuleType):
            yield from _members(name, module)
            for label, value in tuple(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    yield from _members(f"{name}.{label}", value)


def _members(name: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """A Python function counts with its code, which can be replaced as well."""
    for label, value in tuple(vars(owner).items()):
        if isinstance(value, _FUNCTIONS):
            yield f"{name}.{label}", (value, getattr(value, "__code__", None))
