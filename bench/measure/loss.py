"""`python -m rowmax.bench loss`: linear_cross_entropy beside torch's projection and loss, unfused.

Forward and both gradients, timed in turns in one process; and the peak of memory of each, its
results included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import linear_cross_entropy
from ...kernels.backends import dispatch
from ...kernels.testing.cases import DTYPES, dtype_text
from ...kernels.testing.memory import peak_bytes
from ..options import UsageError
from . import figures

SHAPE = (2048, 512, 10_000)
_BY_NAME = {dtype_text(dtype): dtype for dtype in DTYPES}
Call = Callable[[], tuple[Tensor, ...]]


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shape",
        metavar="T,N,V",
        default=",".join(map(str, SHAPE)),
        help="tokens, columns, words of the vocabulary; default: %(default)s",
    )
    command.add_argument("--dtype", choices=_BY_NAME, default="float32", help="default: float32")
    command.add_argument("--smoothing", type=float, default=0.1, help="default: 0.1")
    figures.add_options(command, 30.0, backend=False, device=True)


def run(options: argparse.Namespace) -> int:
    shape = _shape(options.shape)
    if not 0.0 <= options.smoothing <= 1.0:
        raise UsageError(f"--smoothing: expected a number from 0 to 1, got {options.smoothing}")
    machine = figures.begin(options)
    every = calls(shape, _BY_NAME[options.dtype], options.device, options.smoothing)
    memory = {name: _peak(call, options.device) for name, call in every.items()}
    timings = figures.timed(options, every, 5)
    tokens, columns, words = shape
    print(
        f"\nforward and both gradients of x ({tokens}, {columns}), weight ({words}, {columns}), "
        f"{options.dtype}, label smoothing {options.smoothing:g}"
    )
    heading = f"{'':10} {'ms':>8} {'spread':>7} {'of unfused':>11} {'MiB':>8} {'of unfused':>11}"
    print(heading)
    found: dict[str, Any] = {}
    unfused = timings["unfused"].median, memory["unfused"]
    for name, timing in timings.items():
        peak, share = memory[name], timing.median / unfused[0]
        line = f"{name:10} {1e3 * timing.median:8.1f} {100 * timing.spread:6.0f}% {share:11.2f}"
        if peak is not None and unfused[1]:
            line += f" {peak / 2**20:8.1f} {peak / unfused[1]:11.3f}"
        print(line)
        found[name] = {"seconds": timing.median, "spread": timing.spread, "peak_bytes": peak}
    document = {"machine": machine, "shape": shape, "dtype": options.dtype, "found": found}
    figures.write(options, document)
    return 0


def calls(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, smoothing: float
) -> dict[str, Call]:
    """Torch's two functions, and ours by each backend that works there."""
    tokens, columns, words = shape
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    x, weight = normal(tokens), normal(words)
    target = torch.randint(words, (tokens,), generator=generator).to(device)

    def unfused() -> tuple[Tensor, ...]:
        loss = F.cross_entropy(F.linear(x, weight), target, label_smoothing=smoothing)
        return loss, *torch.autograd.grad(loss, (x, weight))

    def fused(backend: str) -> Call:
        def call() -> tuple[Tensor, ...]:
            loss = linear_cross_entropy(x, weight, target, smoothing, backend=backend)
            return loss, *torch.autograd.grad(loss, (x, weight))

        return call

    names = [
        name
        for name in dispatch.PREFERENCE[device]
        if name != "reference" and dispatch.unavailable(name) is None
    ]
    return {"unfused": unfused} | {name: fused(name) for name in names}


def _peak(call: Call, device: str) -> int | None:
    call()  # compiled, and its thread pools grown
    return peak_bytes(call, device)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        tokens, columns, words = map(int, text.split(","))
    except ValueError:
        tokens = columns = words = 0
    if min(tokens, columns, words) < 1:
        raise UsageError(f"--shape {text}: expected three positive numbers T,N,V")
    return tokens, columns, words
