"""`python -m rowmax.bench overhead`: what a call costs when there is next to nothing to compute.

Attention at (B, H, L, D) = (1, 1, 4, 8), layer norm at (4, 8), float32: the checks, the dispatch
and the way to the kernel and back, beside torch's own functions, timed in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..kernels import Causal, attention, layer_norm
from .machine import describe, load_average
from .options import check_backend, seconds_of, set_threads
from .timing import Budget, HostTimer, interleave

Call = Callable[[], object]


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "overhead", help="microseconds of a call that has next to nothing to compute"
    )
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument("--backend", default="auto", help="rowmax's; default: auto")
    command.add_argument("--seconds", type=float, help="to spend on each line; default: 2")


def run(options: argparse.Namespace) -> int:
    seconds = seconds_of("--seconds", options.seconds) or 2.0
    set_threads(options.threads)
    check_backend(options.backend)
    machine = describe()
    print(f"{machine['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("load average", *(f"{load:.2f}" for load in load_average() or ()))
    print(f"\n{'us a call (medians)':34} {'rowmax':>8} {'torch':>8}")
    budget = Budget(seconds=seconds, least_rounds=5, most_rounds=10_000)
    for name, (gradients, ours, theirs) in calls(options.backend).items():
        with torch.set_grad_enabled(gradients):
            for _ in range(100):  # compiled, and warm
                ours(), theirs()
            timings = interleave({"rowmax": ours, "torch": theirs}, budget, HostTimer())
        columns = "".join(f" {1e6 * timing.median:8.1f}" for timing in timings.values())
        print(f"{name:34}{columns}", flush=True)
    return 0


def calls(backend: str = "auto") -> dict[str, tuple[bool, Call, Call]]:
    """What is timed: whether with gradients, rowmax's call, and torch's of the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, 4, 8, generator=generator) for _ in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    rows = torch.randn(4, 8, generator=generator)
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
            lambda: F.layer_norm(rows, (8,)),
        ),
    }
