"""A GPU that isn't there, for every Python that has this folder on PYTHONPATH: what is on "cuda" is
on the CPU, Triton's kernels are interpreted, events read the host's clock, and shapes are tiny.

All lines that lead to the kernels and read what they return are run; neither compiler nor device.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
MAX_SIZE = 16  # of a number of a shape


def is_gpu(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def on_cpu(value: Any) -> Any:
    return torch.device("cpu") if is_gpu(value) else value


def pretend() -> None:
    from torch.overrides import TorchFunctionMode

    class Moved(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.device:
                return func(*args, **(kwargs or {}))
            named = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
            return func(*map(on_cpu, args), **named)

    Moved().__enter__()

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, on_cpu(torch.device(device)))  # type: ignore[call-arg]

    class Event:
        def __init__(self, **_: Any) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return max(1e3 * (end.at - self.at), 1.0)

    properties = SimpleNamespace(
        name="no GPU at all",
        major=9,
        minor=0,
        total_memory=2**36,
        multi_processor_count=132,
        L2_cache_size=2**20,
    )
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    graph = SimpleNamespace(replay=lambda: None)
    torch.Generator = Generator  # type: ignore[misc]
    torch.compile = lambda function, **options: function  # type: ignore[assignment]
    changed: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "synchronize": lambda device=None: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (0, 0),
        "set_sync_debug_mode": lambda mode: None,
        "Event": Event,
        "Stream": lambda device=None: stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph: nullcontext(),
    }
    for name, value in changed.items():
        setattr(torch.cuda, name, value)


def shrink() -> None:
    from rowmax.bench import cli
    from rowmax.bench.machine import gpu
    from rowmax.bench.measure import cases, timing
    from rowmax.bench.tuning import smoke, trials, tune

    shape_of = cli._shape

    def shrunk(text: str) -> cases.Shape:
        return tuple(min(size, MAX_SIZE) for size in shape_of(text))

    cli._shape = shrunk
    for name in ("gpu-attention", "gpu-norms"):
        suite = cases.SUITES[name]
        small = ((1, 8, 16, 16),) if suite.attention else ((16, 24),)
        kinds = suite.kinds if suite.attention else ("add_layer_norm",)
        cases.SUITES[name] = replace(suite, kinds=kinds, shapes=small, quick_shapes=small)
    gpu.measure_limits.__defaults__ = ("cuda", 128, 2**18, 1)
    timing.EventTimer.MAX_FLUSHES = 1
    for name, feature in list(smoke.FEATURES.items()):
        if name not in ("packed", "masked softmax"):
            del smoke.FEATURES[name]
        elif feature.sizes is not None:
            sizes = type(feature.sizes)(*(min(size, MAX_SIZE) for size in feature.sizes))
            smoke.FEATURES[name] = feature._replace(sizes=sizes)
    trials.SIZES.update(dict.fromkeys(trials.SIZES, (1, MAX_SIZE)))
    trials.Trials.__init__.__defaults__ = (torch.bfloat16, trials.SIZES, 128, print)
    vars(tune)["gpu_triton"] = SimpleNamespace(interpreting=lambda: False)
    last = {name: configs[-2:] for name, configs in tune._CONFIGS.items()}
    tune._CONFIGS.update(last)


if any("rowmax.bench" in word or "forkserver" in word for word in sys.orig_argv):
    import torch

    pretend()
    shrink()
elif any("pytest" in word or "stdin.readline" in word for word in sys.orig_argv):  # or of xdist
    import torch

    pretend()
