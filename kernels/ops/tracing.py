"""What a call may do while torch records it into a graph that will see other values and sizes.

`torch.compile` and `torch.export` make sizes symbols. `torch.jit.trace` makes them tensors: sums of
them become nodes of the graph, but to ask for one as a number or a truth warns, and bakes it in.
Exporters to ONNX know torch's operators and none of rowmax's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from .torch_internals import set_tracing_state, tracing_state

_P = ParamSpec("_P")
_R = TypeVar("_R")


def is_recorded() -> bool:
    """Whether this call becomes part of a graph: nothing may depend on the values of a tensor."""
    return torch.compiler.is_compiling() or tracing_state() is not None


def untraced(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """`function(...)`, no part of a graph of torch.jit.trace; sizes are numbers in it.

    For checks alone: what it returns is the same for all that the graph will ever be given.
    """
    state = tracing_state()
    if state is None:
        return function(*args, **kwargs)
    set_tracing_state(None)
    try:
        return function(*args, **kwargs)
    finally:
        set_tracing_state(state)


def same_sizes(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes are one, without a trace of the question."""
    if tracing_state() is None:
        return tuple(a) == tuple(b)
    return untraced(_equal, a, b)


def _equal(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    return tuple(a) == tuple(b)


def is_exported_to_onnx() -> bool:
    """Whether an exporter to ONNX is at work; without its module, which is slow to import, none."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())
