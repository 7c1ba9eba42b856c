"""A GPU that takes launches and does nothing: which kernels, of how many programs, on what."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor


class Launches(list[tuple[str, int, tuple[Any, ...]]]):
    """(kernel, programs, arguments), with addresses for tensors, as a launcher gets them."""

    def in_names(self, tensors: dict[str, Any]) -> Any:
        """With names for addresses; tensors of a kernel's own are numbered, in each launch."""
        names = {
            tensor.data_ptr(): name
            for name, tensor in tensors.items()
            if tensor is not None and tensor.numel()
        }
        assert min(names) > 2**32

        def named(value: Any, own: dict[int, str]) -> Any:
            if isinstance(value, tuple):
                return tuple(named(part, own) for part in value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 2**32:
                return names.get(value) or own.setdefault(value, f"tensor {len(own)} between")
            return value

        return tuple(named(launch, {}) for launch in self)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One H100, and no plan yet."""
    from rowmax.bench.tuning import ahead_of_time
    from rowmax.kernels.backends.gpu_triton import configs, plans

    ahead_of_time.pretend("sm_90")
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(plans, "cache", {})


@pytest.fixture
def launched(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Kernels are not compiled but noted."""
    from triton.runtime.jit import JITFunction

    noted = Launches()

    def warmup(kernel: Any, *, grid: Any, **arguments: Any) -> Any:
        def run(x: int, y: int, z: int, *rest: Any) -> None:
            assert (y, z) == (1, 1)
            noted.append((kernel.fn.__name__, x, addressed(rest[6:])))

        return SimpleNamespace(run=run, function=None, packed_metadata=None)

    monkeypatch.setattr(JITFunction, "warmup", warmup)
    return noted


def addressed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(map(addressed, value)) if isinstance(value, tuple | list) else value


@pytest.fixture
def steps_of() -> Callable[[Callable[[], Any]], int]:
    """The number of functions that the backend calls: its own cost, the same on any machine."""

    def measure(call: Callable[[], Any]) -> int:
        counted: list[str] = []

        def count(frame: Any, event: str, argument: Any) -> None:
            if event in ("call", "c_call") and "gpu_triton" in frame.f_code.co_filename:
                counted.append(event)

        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
        return len(counted)

    return measure
