"""What the judge stands on, sealed: functions that a candidate replaced, settings that it changed.

A candidate runs in the judge's process, so it can reach all of it. The seal holds the clocks, what
times a GPU, torch's functions that peers and judge call, and everything of rowmax itself.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

_BY_NEWER_NAMES = "set by fp32_precision"
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
# torch's compiler replaces it when it is loaded, which is not before something is compiled.
_REPLACED_BY_TORCH = "torch.manual_seed"
_FUNCTIONS = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType),
    *(type, property, classmethod, staticmethod),
    *(functools.partial, functools._lru_cache_wrapper),
)


class Seal:
    """As it is now; `broken` tells what is different later."""

    def __init__(self) -> None:
        self._settings = _settings()
        self._functions = {name: value for name, _, _, value in _functions()}
        self._clocks = {name: getattr(time, name) for name in _CLOCKS if hasattr(time, name)}

    def broken(self) -> str | None:
        """The first thing that is not as it was."""
        for name in _CLOCKS:
            clock = getattr(time, name, None)
            if clock is not None and not isinstance(clock, types.BuiltinFunctionType):
                return f"it replaced time.{name}"
        for name, value in _settings().items():
            if value != self._settings[name]:
                return f"it changed {name} from {self._settings[name]} to {value}"
        for name, _, _, value in _functions():
            if value != self._functions.get(name, value):
                return f"it replaced {name}"
            if name not in self._functions and name.startswith("torch.Tensor."):
                return f"it added {name}"
        return None

    def restore(self) -> None:
        """Everything as it was, so that others are timed and judged by what they should be."""
        for name, clock in self._clocks.items():
            setattr(time, name, clock)
        for name, before in self._settings.items():
            read, put_back = _SETTINGS[name]
            # one by one, for a setter may change what another setting reads
            if put_back is not None and read() != before:
                put_back(before)
        for name, owner, label, value in list(_functions()):
            was = self._functions.get(name)
            if was is None and name.startswith("torch.Tensor."):
                delattr(owner, label)
            elif was is not None and value != was:
                function, code = was
                if code is not None:
                    function.__code__ = code
                setattr(owner, label, function)


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer names, which the one below reads
        return _BY_NEWER_NAMES


def _pop_modes(depth: int) -> None:
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()


# How to read each, and how to set it, where a setter alone does it.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object] | None]] = {
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's precision of float32 products": (
        _precision,
        lambda kind: None if kind == _BY_NEWER_NAMES else torch.set_float32_matmul_precision(kind),
    ),
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the precision of a GPU's float32 products": (
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda kind: setattr(torch.backends.cuda.matmul, "fp32_precision", kind),
    ),
    "the stack of function modes": (torch._C._len_torch_function_stack, _pop_modes),
    "the stack of dispatch modes": (torch._C._len_torch_dispatch_stack, None),
    "denormal numbers": (
        lambda: bool(torch.tensor(1e-310, dtype=torch.float64) * 0.5 > 0),
        lambda wanted: torch.set_flush_denormal(not wanted),
    ),
    "garbage collection": (gc.isenabled, lambda wanted: gc.enable() if wanted else gc.disable()),
    "the interpreter's switch interval": (sys.getswitchinterval, sys.setswitchinterval),
    "the trace function": (sys.gettrace, sys.settrace),
    "the profile function": (sys.getprofile, sys.setprofile),
}
if hasattr(os, "sched_getaffinity"):
    _SETTINGS["the CPUs of the process"] = (
        lambda: os.sched_getaffinity(0),
        lambda cpus: os.sched_setaffinity(0, cpus),
    )


def _settings() -> dict[str, Any]:
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def _functions() -> Iterator[tuple[str, Any, str, Any]]:
    """Name, where it is kept, its label there, and what it is."""
    for name, owner in (*_TORCH, *_CLASSES):
        yield from _members(name, owner)
    for name, module in tuple(sys.modules.items()):
        if name.startswith(_MODULES) and isinstance(module, types.ModuleType):
            yield from _members(name, module)
            for label, value in tuple(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    yield from _members(f"{name}.{label}", value)


def _members(name: str, owner: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """A Python function counts with its code, which can be replaced as well."""
    for label, value in tuple(vars(owner).items()):
        if isinstance(value, _FUNCTIONS) and f"{name}.{label}" != _REPLACED_BY_TORCH:
            yield f"{name}.{label}", owner, label, (value, getattr(value, "__code__", None))
