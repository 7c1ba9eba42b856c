"""The naive and the fused path side by side: the same training steps, each in its own process.

``python -m rowmax.transformer.comparison`` is the process that is measured; ``compare`` starts
one for each backend and ``table`` shows what came out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import console
from ..kernels.testing.memory import forget_peak, resident_bytes
from . import checkpoint as checkpoints
from . import corpus
from .checkpoint import CheckpointError
from .config import PRESETS, ModelConfig, TrainingConfig
from .data import Dataset
from .model import EncoderDecoder
from .training import Trainer, TrainingError

STEPS = 100
# Pairs to draw the steps' batches from: enough for STEPS batches that are all different.
_PAIRS = 20_000
_WARM_UP = 2


@dataclass(frozen=True)
class Measurement:
    """One backend's first steps. Memory in bytes: of the process, and what training added."""

    backend: str
    losses: list[float]
    tokens_per_second: float
    peak_memory: int
    training_memory: int


def measure(run: Path, backend: str, steps: int) -> Measurement:
    """Train the demo's model for its first steps in this process; the naive path pads."""
    tokenizer = checkpoints.load(checkpoints.newest(run)).tokenizer
    preset = PRESETS["demo"]
    model_config = ModelConfig(**{**preset.model, "vocab_size": tokenizer.vocab_size})
    config = TrainingConfig(**preset.training, padded=backend == "reference")
    pairs = list(corpus.splits(train=_PAIRS).train)
    dataset = Dataset(pairs, tokenizer, model_config.max_length)

    def new_trainer() -> Trainer:
        torch.manual_seed(config.seed)
        return Trainer(EncoderDecoder(model_config, backend), dataset, config)

    # The first calls load or compile kernels and grow thread pools: not what is compared.
    warm_up = new_trainer()
    for _ in range(_WARM_UP):
        warm_up.step()
    del warm_up
    gc.collect()

    with contextlib.suppress(OSError):
        forget_peak()
    before = resident_bytes()
    trainer = new_trainer()
    start = time.perf_counter()
    results = [trainer.step() for _ in range(steps)]
    seconds = time.perf_counter() - start
    peak = resident_bytes(at_peak=True)
    return Measurement(
        backend=backend,
        losses=[result.loss for result in results],
        tokens_per_second=sum(result.tokens for result in results) / seconds,
        peak_memory=peak,
        training_memory=peak - before,
    )


def compare(run: Path, backends: tuple[str, str], steps: int = STEPS) -> list[Measurement]:
    """Measure each backend in a process of its own, with this process's number of threads."""
    measurements = []
    for backend in backends:
        command = [sys.executable, "-m", __name__, str(run), backend, str(steps)]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise TrainingError(f"backend {backend}: its process ended with {done.returncode}")
        measurements.append(Measurement(**json.loads(done.stdout)))
    return measurements


def largest_difference(first: Measurement, second: Measurement) -> float:
    """The largest difference between the two losses of a step."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


def table(naive: Measurement, fused: Measurement) -> str:
    """Both paths as text."""
    rows = [("", f"naive ({naive.backend})", f"fused ({fused.backend})", "ratio")]
    for name, field, unit in (
        ("tokens/s", "tokens_per_second", 1),
        ("peak memory of the process, MiB", "peak_memory", 2**20),
        ("  of which training, MiB", "training_memory", 2**20),
    ):
        one, other = getattr(naive, field), getattr(fused, field)
        rows.append((name, f"{one / unit:,.0f}", f"{other / unit:,.0f}", f"{other / one:.2f}"))
    losses = f"{naive.losses[-1]:.6f}", f"{fused.losses[-1]:.6f}"
    rows.append((f"loss after {len(naive.losses)} steps", *losses, ""))
    lines = [f"{name:<33}{first:>18}{second:>18}{ratio:>8}" for name, first, second, ratio in rows]
    lines.append(
        f"largest difference in loss over these {len(naive.losses)} steps: "
        f"{largest_difference(naive, fused):.2e}"
    )
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Measure one backend and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory with the demo's checkpoints")
    parser.add_argument("backend")
    parser.add_argument("steps", type=int)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.run, args.backend, args.steps).__dict__))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "error: ", (CheckpointError, TrainingError)))
