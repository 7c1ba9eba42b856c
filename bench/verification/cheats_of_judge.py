"""Cheats that reach for the judge: its clocks, its rule, its peers, or what it knows already."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..conduct import clocks
from .cheats_help import Forward, by_shape, honest, lower_precision, with_right_gradient


def from_the_frame(_stack: ExitStack) -> Forward:
    """What the checker's frames hold of the right result, or else lower precision."""

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        frame: Any = sys._getframe()
        while frame is not None:
            for value in list(frame.f_locals.values()):
                found = _right_result(value, (*q.shape[:3], v.shape[3]))
                if found is not None:
                    return found
            frame = frame.f_back
        return lower_precision(q, k, v, **options)

    return with_right_gradient(forward)


def _right_result(value: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The naive result that a gate or a test case holds, its pieces joined."""
    fields = getattr(value, "__dict__", {})
    if isinstance(fields.get("expected"), dict):
        found = fields["expected"]["out"].naive
        return found.clone() if found.shape == shape else None
    for pieces in dict(fields.get("_pieces") or {}).values():
        parts = [piece.expected[0].naive for piece in pieces]
        joined = torch.cat(parts) if parts[0].shape[1:] == shape[1:] else None
        if joined is not None and joined.shape == shape:
            return joined
    return None


def _patched(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, before)


def patching(*patches: Callable[[ExitStack], None]) -> Callable[[ExitStack], Forward]:
    """At the first call, where an import would be looked at."""

    def make(stack: ExitStack) -> Forward:
        left = list(patches)

        def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            while left:
                left.pop()(stack)
            return honest(q, k, v, **options)

        return sdpa

    return make


def slow_clock(stack: ExitStack) -> None:
    """Half as fast, in the module that everyone takes it from."""
    real = time.perf_counter
    _patched(time, "perf_counter", lambda: real() / 2, stack)


def slow_timer(stack: ExitStack) -> None:
    """Half as fast, in the timer that `speed` has made already."""
    from ..measure.timing import timer_for

    timer: Any = timer_for("cpu")
    _patched(timer, "now", lambda: clocks.host() / 2, stack)


def both_clocks(stack: ExitStack) -> None:
    """Half as fast, the timer's clock and the one that it is compared with."""
    real = clocks.other
    _patched(clocks, "other", lambda: real() / 2, stack)
    slow_timer(stack)


def false_events(stack: ExitStack) -> None:
    class Event:
        def __init__(self, **_options: Any) -> None: ...
        def record(self, *_stream: Any) -> None: ...
        def elapsed_time(self, _end: Any) -> float:
            return 1e-3

    _patched(torch.cuda, "Event", Event, stack)


def sleeping_peers(stack: ExitStack) -> None:
    real = F.scaled_dot_product_attention

    def slow(*arguments: Any, **options: Any) -> Tensor:
        time.sleep(1e-3)
        return real(*arguments, **options)

    _patched(F, "scaled_dot_product_attention", slow, stack)


def mild_judge(stack: ExitStack) -> None:
    from ...kernels.testing import tolerance

    real = tolerance._compared

    def compared(*arguments: Any) -> Any:
        return real(*arguments)._replace(fault=None)

    _patched(tolerance, "_compared", compared, stack)


def fewer_threads(stack: ExitStack) -> None:
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(torch.get_num_threads() + 1)


def lower_settings(stack: ExitStack) -> None:
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("medium")


def mode_left_on(stack: ExitStack) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    depth = torch._C._len_torch_function_stack()
    Mode().__enter__()

    def leave() -> None:
        while torch._C._len_torch_function_stack() > depth:
            torch._C._pop_torch_function_stack()

    stack.callback(leave)


def busy_thread(stack: ExitStack) -> None:
    """Takes the processor from whoever is timed next."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    stack.callback(thread.join)
    stack.callback(ended.set)


def only_when_timed(_stack: ExitStack) -> Forward:
    """Right, but where a frame above it is a timer's."""
    kept: dict[object, Tensor] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        frame: Any = sys._getframe()
        while frame is not None and "sample" not in frame.f_code.co_name:
            frame = frame.f_back
        shape = by_shape(q, k, v)
        if frame is None or shape not in kept:
            kept[shape] = honest(q, k, v, **options)
        return kept[shape].clone()

    return with_right_gradient(forward)
