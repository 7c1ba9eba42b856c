"""Which backends the tests run on, and what each of them is known to decline.

The list of backends comes from dispatch: all that work on this machine. What a backend declines
stands here in full: a test of a declined combination asserts the refusal and its reason, and a
backend that starts to do more, or less, than this page says fails.
"""

from __future__ import annotations

import re

import pytest
import torch

from rowmax.kernels.backends import dispatch

BACKENDS = [name for name, reason in dispatch.installation().items() if reason is None]

# backend -> {op or feature that it declines: what the refusal says}
DECLINES: dict[str, dict[str, str]] = {
    "reference": {},
    "numba": {},
    "native": {},
    "triton": {},
}


def doing(op: str) -> list[str]:
    """The backends available here that do `op` at all."""
    return [name for name in BACKENDS if op not in DECLINES[name]]


def device_of(backend: str) -> torch.device:
    """Where the backend's tensors lie; on the CPU when Triton's interpreter runs its kernels."""
    on_gpu = backend == "triton" and not is_interpreted(backend)
    return torch.device("cuda" if on_gpu else "cpu")


def is_interpreted(backend: str) -> bool:
    """Whether its kernels run in Triton's interpreter: right, and a thousand times slower."""
    return backend == "triton" and not torch.cuda.is_available()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refusal(backend: str, features: set[str]) -> str | None:
    """A regex for the refusal that `backend` owes to a problem of these features, if it does."""
    reasons = [text for feature, text in DECLINES[backend].items() if feature in features]
    return (
        f"{backend}.*(" + "|".join(re.escape(reason) for reason in reasons) + ")"
        if reasons
        else None
    )


def refused(backend: str, features: set[str], call, /) -> bool:
    """Whether `backend` declines; then `call()` must have raised with the reason on its list."""
    expected = refusal(backend, features)
    if expected is None:
        return False
    with pytest.raises(RuntimeError, match=expected):
        call()
    return True
