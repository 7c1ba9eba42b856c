"""Whether a call may go past torch's dispatcher, straight to its backend.

The dispatcher and the operator's Python kernels cost 20 us a call, several times what a tiny
problem takes. A call may leave them out where none of what they serve takes part: tracing and
compiling, modes, functorch's transforms, forward-mode AD, autocast, the profiler, and tensors that
are not what their memory says (subclasses, lazy negation, what a transform left behind).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C = torch._C
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_KEYS = (_C.DispatchKey.BackendSelect, _C.DispatchKey.ADInplaceOrView)
# What the dispatcher adds to every tensor's keys where no mode, transform or trace is active: in
# inference mode the first, else both.
_USUAL = frozenset(
    (
        _C.DispatchKeySet(_KEYS[0]).raw_repr(),
        (_C.DispatchKeySet(_KEYS[0]) | _C.DispatchKeySet(_KEYS[1])).raw_repr(),
    )
)


def nothing_watches() -> bool:
    """No mode, transform, trace or profiler is active that would see an operator's call."""
    return not (
        torch.compiler.is_compiling()
        or _C._dispatch_tls_local_include_set().raw_repr() not in _USUAL
        or _C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or _C._is_any_autocast_enabled()
        or _C._autograd._profiler_enabled()
    )


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Ordinary tensors whose memory, on a CPU or a GPU, holds their values.

    The first tells where they lie: a problem's tensors are on one device.
    """
    for tensor in tensors:
        if (
            type(tensor) not in _PLAIN
            or tensor.is_neg()
            or _C._functorch.is_functorch_wrapped_tensor(tensor)
        ):
            return False
    return tensors[0].is_cpu or tensors[0].is_cuda


def tensors_in(arguments: Iterable[object]) -> list[Tensor]:
    return [argument for argument in arguments if isinstance(argument, Tensor)]
