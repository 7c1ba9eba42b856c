"""What the commands that time a few engines in turns have in common: options, heading, JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..machine import gpu
from ..machine.host import describe, load_average
from ..options import UsageError, check_backend, check_outputs, seconds_of, set_threads
from ..options import write as written
from .timing import Budget, Timing, interleave, timer_for

DEVICES = ("cpu", "cuda")
Call = Callable[[], object]


def add_options(
    command: argparse.ArgumentParser,
    seconds: float,
    on: str = "all",
    backend: bool = True,
    device: bool = False,
) -> None:
    if device:
        command.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    if backend:
        command.add_argument("--backend", default="auto", help="rowmax's; default: auto")
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument(
        "--seconds", type=float, default=seconds, help=f"to spend on {on}; default: %(default)g"
    )
    command.add_argument("--json", metavar="FILE", type=Path, help="write the figures here too")


def begin(options: argparse.Namespace, *counts: str) -> dict[str, Any]:
    """Check the options, of those that are named for 1 or more; tell of the machine."""
    seconds_of("--seconds", options.seconds)
    set_threads(options.threads)
    check_outputs({"--json": options.json})
    check_backend(getattr(options, "backend", "auto"))
    for name in counts:
        if getattr(options, name) < 1:
            raise UsageError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    on_gpu = getattr(options, "device", "cpu") == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UsageError("--device: torch sees no GPU")
    machine = describe()
    print(f"{machine['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if on_gpu:
        machine["gpu"] = gpu.describe()
        print(gpu.text(machine["gpu"]))
    print("load average", *(f"{load:.2f}" for load in load_average() or ()))
    return machine


def timed(options: argparse.Namespace, calls: Mapping[str, Call], fewest: int) -> dict[str, Timing]:
    """In turns for the time of --seconds, `fewest` rounds at least."""
    budget = Budget(seconds=options.seconds, min_rounds=fewest, max_rounds=1000)
    return interleave(calls, budget, timer_for(getattr(options, "device", "cpu")))


def write(options: argparse.Namespace, document: Mapping[str, Any]) -> None:
    """Into --json, where it was given."""
    written(options.json, lambda: json.dumps(document, indent=2) + "\n")


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Within it so many other processes want a CPU each all the time."""
    with contextlib.ExitStack() as started:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            started.callback(process.wait)
            started.callback(process.kill)
        yield
