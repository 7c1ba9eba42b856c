"""`python -m rowmax.bench overhead`: the fixed cost of a call.

Attention at (B, H, L, D) = (1, 1, 4, 8), layer norm at (4, 8), float32: the checks, the dispatch
and the way to the kernel and back, beside torch's own functions, timed in turns. On a GPU attention
at (1, 4, 128, 64), layer norm at (128, 64), bfloat16: what the host spends on launching, and the
replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import Causal, attention, layer_norm
from . import figures
from .timing import Budget, HostTimer, LaunchTimer, Timer, interleave, timer_for

Call = Callable[[], object]


def add_options(command: argparse.ArgumentParser) -> None:
    figures.add_options(command, 2.0, on="each line", device=True)


def run(options: argparse.Namespace) -> int:
    machine, device = figures.begin(options), options.device
    timer: Timer = LaunchTimer() if device == "cuda" else HostTimer()
    print(f"\n{'us a call (medians)':34} {'rowmax':>8} {'torch':>8}")
    budget = Budget(options.seconds, min_rounds=5, max_rounds=10_000)
    found: dict[str, dict[str, float]] = {}

    def line(name: str, ours: Call, theirs: Call, timer: Timer) -> None:
        timings = interleave({"rowmax": ours, "torch": theirs}, budget, timer)
        found[name] = {of: timing.median for of, timing in timings.items()}
        columns = "".join(f" {1e6 * timing.median:8.1f}" for timing in timings.values())
        print(f"{name:34}{columns}", flush=True)
        figures.write(options, {"machine": machine, "seconds": found})

    every = calls(options.backend, device)
    for name, (gradients, ours, theirs) in every.items():
        with torch.set_grad_enabled(gradients):
            for _ in range(100):  # compiled, and warm
                ours(), theirs()
            line(name, ours, theirs, timer)
    if device == "cuda":
        name = "attention, forward and backward"
        _, ours, theirs = every[name]
        line(f"{name}, replay", recorded(ours), recorded(theirs), timer_for(device))
    return 0


def recorded(call: Callable[[], Any]) -> Call:
    """The replay of a CUDA graph of `call`. RuntimeError where it gives something else."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()
    graph.replay()
    for got, right in zip(held, expected, strict=True):
        torch.testing.assert_close(got, right)
    return graph.replay


def calls(backend: str = "auto", device: str = "cpu") -> dict[str, tuple[bool, Call, Call]]:
    """A pair of timed calls, rowmax's and torch's, and whether they compute gradients."""
    generator = torch.Generator().manual_seed(0)
    on_gpu = device == "cuda"
    size, dtype = ((1, 4, 128, 64), torch.bfloat16) if on_gpu else ((1, 1, 4, 8), torch.float32)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    q, k, v, grad = (normal(*size) for _ in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    rows = normal(*size[2:])
    causal = Causal()

    def ours() -> torch.Tensor:
        return attention(leaves[0], leaves[1], leaves[2], backend=backend)

    def theirs() -> torch.Tensor:
        return sdpa(leaves[0], leaves[1], leaves[2])

    def with_backward(call: Callable[[], torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(call(), leaves, grad)

    sdpa = F.scaled_dot_product_attention
    return {
        "attention": (False, lambda: attention(q, k, v, backend=backend), lambda: sdpa(q, k, v)),
        "attention, causal": (
            False,
            lambda: attention(q, k, v, causal, backend=backend),
            lambda: sdpa(q, k, v, is_causal=True),
        ),
        "attention, forward for a gradient": (True, ours, theirs),
        "attention, forward and backward": (True, with_backward(ours), with_backward(theirs)),
        "layer norm": (
            False,
            lambda: layer_norm(rows, backend=backend),
            lambda: F.layer_norm(rows, rows.shape[-1:]),
        ),
    }
