"""Every private name of torch that rowmax uses: what a new version of torch may break stands here.

Each has served torch 2.10 to 2.13. Public functions do the same more slowly, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
)
from torch._C import _after_autograd_keyset as after_autograd_keyset
from torch._C import _any_requires_grad as any_requires_grad
from torch._C import _are_functorch_transforms_active as functorch_is_active
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _dispatch_keys as dispatch_keys
from torch._C import _dispatch_tls_local_include_set as included_keys
from torch._C import _get_tracing_state as tracing_state
from torch._C import _is_any_autocast_enabled as any_autocast_enabled
from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
from torch._C import _len_torch_function_stack as count_function_modes
from torch._C._autograd import _profiler_enabled as profiler_enabled
from torch._functorch.utils import (
    enable_single_level_autograd_function as single_level_functions,
)
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_forward_mode
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction

__all__ = [
    "BelowAutograd",
    "DispatchKey",
    "DispatchKeySet",
    "OpOverload",
    "SingleLevelFunction",
    "after_autograd_keyset",
    "any_autocast_enabled",
    "any_requires_grad",
    "assert_async",
    "count_dispatch_modes",
    "count_function_modes",
    "dispatch_keys",
    "empty_strided_on",
    "forward_mode_is_on",
    "functorch_is_active",
    "included_keys",
    "onednn_linear",
    "profiler_enabled",
    "remember_decisions_by",
    "set_forward_mode",
    "set_tracing_state",
    "single_level_functions",
    "tracing_state",
]

set_tracing_state: Callable[[object], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]
assert_async: Callable[[Tensor, str], None] = torch._assert_async


def forward_mode_is_on() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def empty_strided_on(device_type: str) -> Callable[..., Tensor]:
    """torch.empty_strided(sizes, strides, dtype) on one kind of device, past the dispatcher."""
    found: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}")
    return found


def onednn_linear() -> tuple[Callable[..., Tensor], Callable[[Tensor, int], Tensor]] | None:
    """What oneDNN has for x @ weight.T + bias in float32 on a CPU, without a gradient; None where
    this torch has no oneDNN. (`torch.nn.functional.linear` takes the BLAS it was built with.)

    The first takes x (..., N), weight (M, N) and bias (M,) or None. The second makes of a weight
    one in oneDNN's own layout, which the first takes as well, for products of about so many rows.
    """
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not built:
        return None
    multiply = torch.ops.mkldnn._linear_pointwise.default
    reorder: Callable[[Tensor, int], Tensor] = torch.ops.mkldnn._reorder_linear_weight.default
    return lambda x, weight, bias: multiply(x, weight, bias, "none", [], ""), reorder


def remember_decisions_by(overload: OpOverload, first_argument: int) -> None:
    """How DTensors remember an operator's sharding: by the arguments from this one on."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    schema_info: dict[Any, Any] = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    schema_info[overload] = RuntimeSchemaInfo(first_argument, needs_pytree=True)
