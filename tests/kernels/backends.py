"""The backends that the tests run on: all that work on this machine. Each does everything."""

from __future__ import annotations

import torch

from rowmax.kernels.backends import dispatch

BACKENDS = [name for name, reason in dispatch.installation().items() if reason is None]


def device_of(backend: str) -> torch.device:
    """Where the backend's tensors lie; on the CPU when Triton's interpreter runs its kernels."""
    on_gpu = backend == "triton" and not is_interpreted(backend)
    return torch.device("cuda" if on_gpu else "cpu")


def is_interpreted(backend: str) -> bool:
    """Whether its kernels run in Triton's interpreter: right, and a thousand times slower."""
    return backend == "triton" and not torch.cuda.is_available()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
