"""Whether a call may go past torch's dispatcher, straight to its backend.

The dispatcher and the operator's Python kernels cost 20 us a call, several times what a tiny
problem takes. A call may leave them out where none of what they serve takes part: tracing and
compiling, modes, functorch's transforms, forward-mode AD, autocast and the profiler; and where
every tensor is proven to be what its memory says. Torch has many that are not, more with each
version: zeros without memory, lazy negation, subclasses, sparse and quantized ones, what a
transform left behind. So the few forms of an ordinary tensor are listed, not what is special.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .torch_internals import (
    DispatchKey,
    DispatchKeySet,
    any_autocast_enabled,
    count_function_modes,
    dispatch_keys,
    forward_mode_is_on,
    included_keys,
    profiler_enabled,
)

_raw = DispatchKeySet.raw_repr


def _keys(*keys: DispatchKey) -> int:
    return _raw(functools.reduce(operator.or_, map(DispatchKeySet, keys)))


# What the dispatcher adds to every tensor's keys where no mode, transform or trace is active: in
# inference mode the first, else both.
_USUAL = frozenset(
    (
        _keys(DispatchKey.BackendSelect),
        _keys(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView),
    )
)
# The keys of a tensor with memory of its own on a CPU or a GPU, made in inference mode or not.
_ORDINARY = frozenset(
    _keys(*keys, *with_autograd)
    for *keys, autograd in (
        (DispatchKey.CPU, DispatchKey.AutocastCPU, DispatchKey.AutogradCPU),
        (DispatchKey.CUDA, DispatchKey.AutocastCUDA, DispatchKey.AutogradCUDA),
    )
    for with_autograd in ((), (DispatchKey.ADInplaceOrView, autograd))
)
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((type(None), bool, int, float, str))


def nothing_watches() -> bool:
    """No mode, transform, trace or profiler is active that would see an operator's call."""
    return not (
        is_compiling()
        or _raw(included_keys()) not in _USUAL
        or count_function_modes()
        or forward_mode_is_on()
        or any_autocast_enabled()
        or profiler_enabled()
    )


def are_ordinary(arguments: Iterable[Any]) -> bool:
    """An operator's arguments, whose tensors are ordinary ones: their memory holds their values."""
    for argument in arguments:
        kind = type(argument)
        if kind not in _NO_TENSORS and (
            kind not in _TENSORS or _raw(dispatch_keys(argument)) not in _ORDINARY
        ):
            return False
    return True
