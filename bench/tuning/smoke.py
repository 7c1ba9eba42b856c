"""`python -m rowmax.bench smoke`: does each feature of the Triton kernels run on this GPU at all?

Each one in bfloat16 and float32 has a process of its own, in which every launch is waited for, and
is compared with float64, forward and backward. The report begins with the machine and its limits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from time import perf_counter
from typing import NamedTuple

import torch

from ...kernels.testing.cases import Shape
from ...kernels.testing.tolerance import accuracies
from ..machine import gpu
from ..machine.host import describe
from ..measure import isolated, report
from ..measure.cases import SUITES
from ..measure.timing import timer_for
from ..options import UsageError, names_of, seconds_of
from ..verification.implementations import Backend
from ..verification.runs import Run
from ..verification.suite import DTYPES, Settings, cases_of
from ..verification.text import VERBOSE_HEADING, verbose_line

_USUAL = Shape(2, 4, 4, 200, 200, 64, 64)
_GROUPED = Shape(2, 8, 2, 200, 200, 128, 128)


class Feature(NamedTuple):
    """Cases of `verify`."""

    ops: tuple[str, ...]
    kinds: tuple[str, ...]
    sizes: Shape | None = None  # of attention


def _attention_feature(kind: str, sizes: Shape = _USUAL) -> Feature:
    return Feature(("attention",), (kind,), sizes)


# The slowest first: their kernels take longest to compile, and they run side by side.
FEATURES: dict[str, Feature] = {
    "everything": _attention_feature("everything", _GROUPED),
    "heads of 72": _attention_feature("causal", Shape(2, 4, 4, 100, 100, 72, 72)),
    "packed": Feature(("attention_varlen",), ("causal",), Shape(3, 4, 2, 150, 150, 64, 64)),
    "add and norm": Feature(("add_layer_norm",), ("weight", "dropout")),
    "alibi": _attention_feature("alibi"),
    "softcap": _attention_feature("softcap"),
    "bias": _attention_feature("bias"),
    "documents": _attention_feature("documents"),
    "decoding": _attention_feature("causal", Shape(2, 8, 2, 1, 2100, 128, 128)),
    "grouped": _attention_feature("causal", _GROUPED),
    "dropout": _attention_feature("dropout-causal"),
    "window": _attention_feature("window"),
    "padded": _attention_feature("key-lengths"),
    "causal": _attention_feature("causal"),
    "full": _attention_feature("none"),
    "dense": _attention_feature("dense"),
    "layer norm": Feature(("layer_norm",), ("weight",)),
    "RMS norm": Feature(("rms_norm",), ("weight",)),
    "sinks": _attention_feature("sinks"),
    "masked softmax": Feature(("masked_softmax",), ("key-lengths", "causal", "dense")),
    "linear cross entropy": Feature(("linear_cross_entropy",), ("smoothing", "ignored")),
}
TYPES = ("bfloat16", "float32")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--feature", metavar="NAMES", help=f"of {', '.join(FEATURES)}")
    command.add_argument("--dtype", metavar="NAMES", help=f"of {', '.join(TYPES)}")
    command.add_argument(
        "--seconds", type=float, help="for all of them, after which none goes on; default: 300"
    )
    command.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="at once; default: one a CPU"
    )


def run(options: argparse.Namespace) -> int:
    """The command; exit status 1 where something is wrong."""
    names = names_of("--feature", options.feature, FEATURES)
    dtypes = names_of("--dtype", options.dtype, TYPES)
    seconds = seconds_of("--seconds", options.seconds) or 300.0
    if options.jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, got {options.jobs}")
    if not torch.cuda.is_available():
        raise UsageError("smoke: torch sees no GPU")
    ends = perf_counter() + seconds
    suite = SUITES["gpu-attention"]
    limits = gpu.measure_limits(suite.dtypes[0], timer_for(suite.device))
    machine = describe() | {"gpu": gpu.describe()}
    print("\n".join(report.machine_lines(machine, {suite.device: limits}, [suite])))
    print(f"\n{'seconds':>7} {VERBOSE_HEADING}", flush=True)
    # read at the start of a process of CUDA, and so by those that are begun from now on
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_lines, name, dtype, ends) for name in names for dtype in dtypes]
        for done in as_completed(jobs):
            passed, lines = done.result()
            wrong += not passed
            print("\n".join(lines), flush=True)
    print(f"{len(jobs) - wrong} of {len(jobs)} are right")
    return 1 if wrong else 0


def _lines(name: str, dtype: str, ends: float) -> tuple[bool, list[str]]:
    """Whether a feature is right, and the lines that report it."""
    started = perf_counter()
    if started >= ends:
        return False, [f"{name} {dtype}: not begun, no time was left"]
    passed, lines = True, []
    try:
        for right, line in isolated.results(check, name, dtype, seconds=ends - started):
            passed &= right
            lines.append(f"{perf_counter() - started:7.1f} {line}")
    except isolated.LostError as error:
        passed = False
        lines.append(f"{perf_counter() - started:7.1f} {name} {dtype}: {error}")
    return passed, lines


def check(name: str, dtype: str) -> Iterator[tuple[bool, str]]:
    """Whether each case of the feature passes, and a line of it. Errors go on to the caller."""
    torch.set_num_threads(1)
    feature = FEATURES[name]
    shapes = () if feature.sizes is None else (feature.sizes,)
    settings = Settings(feature.ops, feature.kinds, shapes=shapes, quick=True)
    backend = Backend("triton")
    for named in cases_of(settings, DTYPES[dtype]):
        case = named.case()
        results = case.run(backend.kernel(named.op), backend.device)
        found = Run(named, accuracies(results, case.expected, case.sum_dtype))
        yield found.passed, "\n        ".join((verbose_line(found), *found.faults))
