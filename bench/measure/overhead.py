"""`python -m rowmax.bench overhead`: the fixed cost of a call.

Attention at (B, H, L, D) = (1, 1, 4, 8), layer norm at (4, 8), float32: the checks, the dispatch
and the way to the kernel and back, beside torch's own functions, timed in turns. On a GPU attention
at (1, 4, 128, 64), layer norm at (128, 64), bfloat16: what the host spends on launching, and the
replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import Causal, attention, layer_norm
from ..machine import gpu
from ..machine.host import describe, load_average
from ..options import UsageError, check_backend, check_outputs, seconds_of, set_threads
from .timing import Budget, HostTimer, LaunchTimer, Timer, interleave, timer_for

Call = Callable[[], object]
DEVICES = ("cpu", "cuda")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "overhead", help="microseconds of a call that has next to nothing to compute"
    )
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument("--backend", default="auto", help="rowmax's; default: auto")
    command.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    command.add_argument("--seconds", type=float, help="to spend on each line; default: 2")
    command.add_argument("--json", metavar="FILE", type=Path, help="write the medians here too")


def run(options: argparse.Namespace) -> int:
    seconds = seconds_of("--seconds", options.seconds) or 2.0
    device = options.device
    set_threads(options.threads)
    check_backend(options.backend)
    check_outputs({"--json": options.json})
    machine = describe()
    print(f"{machine['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    timer: Timer = HostTimer()
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device: torch sees no GPU")
        machine["gpu"] = gpu.describe()
        print(gpu.text(machine["gpu"]))
        timer = LaunchTimer()
    print("load average", *(f"{load:.2f}" for load in load_average() or ()))
    print(f"\n{'us a call (medians)':34} {'rowmax':>8} {'torch':>8}")
    budget = Budget(seconds=seconds, min_rounds=5, max_rounds=10_000)
    found: dict[str, dict[str, float]] = {}

    def line(name: str, ours: Call, theirs: Call, timer: Timer) -> None:
        timings = interleave({"rowmax": ours, "torch": theirs}, budget, timer)
        found[name] = {of: timing.median for of, timing in timings.items()}
        columns = "".join(f" {1e6 * timing.median:8.1f}" for timing in timings.values())
        print(f"{name:34}{columns}", flush=True)
        if options.json is not None:
            document = {"machine": machine, "seconds": found}
            options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

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
