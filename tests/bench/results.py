"""A document as `speed --json` writes it, without measuring anything."""

from __future__ import annotations

from typing import Any

import torch

from rowmax.bench.machine.host import CpuLimits
from rowmax.bench.measure import report
from rowmax.bench.measure.cases import FORWARD, FORWARD_BACKWARD, SUITES, Case
from rowmax.bench.measure.runner import Row
from rowmax.bench.measure.timing import Timing

MACHINE = {
    "cpu": "Some CPU <of ours>",
    "instruction_set": "AVX2",
    "torch_threads": 2,
    "python": "3.11.0",
    "packages": {"rowmax": "0.1.0", "torch": "2.13.0"},
    "load_average": (0.1, 0.1, 0.1),
}


def timing(seconds: float, spread: float = 0.01) -> Timing:
    low, high = seconds * (1 - spread), seconds * (1 + spread)
    return Timing(seconds, low, high, 20, (low, high), 1)


def row(
    shape: tuple[int, ...], rowmax: float, peer: float, *, step: str = FORWARD, kind: str = "causal"
) -> Row:
    suite = SUITES["cpu-attention" if len(shape) > 2 else "cpu-norms"]
    case = Case(suite, torch.float32, kind, shape, step)
    timings = {"rowmax": timing(rowmax), "sdpa": timing(peer), "naive": timing(2 * peer)}
    first = dict.fromkeys(timings, 0.5)
    memory: dict[str, int | None] = dict.fromkeys(timings, 3 << 20)
    rest = (memory, 10**9, 10**7)
    return Row(case, timings, {}, {}, False, first, 1e9, 0.5, None, *rest)


def document(factor: float = 1.0, complaints: tuple[str, ...] = ()) -> dict[str, Any]:
    """A run whose rowmax took `factor` times as long."""
    rows = [
        row((8, 8, 128, 64), 0.001 * factor, 0.002),
        row((8, 8, 512, 64), 0.010 * factor, 0.025),
        row((8, 8, 512, 64), 0.030 * factor, 0.0301, step=FORWARD_BACKWARD),
        row((4096, 512), 0.002 * factor, 0.001, kind="layer_norm"),
    ]
    limits = {"cpu": CpuLimits(2, 2e11, 2e10)}
    settings = {"started": "2026-01-02T03:04:05+00:00"}
    noise = {"clock_drift": 0.01, "stolen": 0.0, "complaints": list(complaints)}
    return report.document(rows, MACHINE, limits, settings, None, noise)
