"""`python -m rowmax.bench`: the command line. Exit status 2 is a wrong call, 1 a failed check.

A peer that raises an error has no way to compute a case; that is reported, but no failed check.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from .. import console
from .experiments import architectures
from .machine import gpu
from .machine.host import Limits, describe, load_average, measure_limits
from .measure import comparison, decoding, history, loss, overhead, report, swap, training
from .measure.cases import PARTS, PASSES, SUITES, Case, Shape, Suite, cases_of, parts_of, shape_text
from .measure.noise import Watch, complaints, keep_freed_memory, pinned
from .measure.runner import Row, isolated_rows, rows_of, stranger_of
from .measure.timing import Budget, timer_for
from .options import (
    UsageError,
    check_backend,
    check_outputs,
    current_name,
    listed,
    names_of,
    seconds_of,
    set_threads,
)
from .peers.candidates import HOW_TO_GET_PEERS, ONLY_BY_NAME, SLOW_TO_START, absent, peers_of
from .render import ratio_chart, speed_page
from .shapes import calls, recorder, saving
from .tuning import configs, smoke, tune
from .verification import command as verification

FULL = Budget(seconds=4.0, min_rounds=5, max_rounds=200)
QUICK = Budget(seconds=1.0, min_rounds=3, max_rounds=50)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Those that have a module of their own, with `add_command` and `run`, in the order of --help.
_COMMANDS: dict[str, Any] = {
    "compare": comparison,
    "chart": ratio_chart,
    "record": recorder,
    "verify": verification,
    "loss": loss,
    "overhead": overhead,
    "smoke": smoke,
    "swap": swap,
    "training": training,
    "decoding": decoding,
    "tune": tune,
    "configs": configs,
    "model": architectures,
}

T = TypeVar("T")

_PREFIX = "rowmax.bench: "


def main(arguments: Sequence[str] | None = None) -> int:
    return console.run(lambda: _run(arguments), _PREFIX)


def _run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except UsageError as error:
        parser.exit(2, f"{_PREFIX}{error}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rowmax.bench",
        description="Measures the kernels of rowmax against PyTorch's own paths.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "speed",
        help="time, share of the machine's limits, and the ratio to the fastest peer",
        description=(
            "Times rowmax and its peers in turns, in one run, each after it has passed a "
            "correctness check against float64."
        ),
        epilog="example: python -m rowmax.bench speed --shape 8,8,512,64 --kind full,dropout",
    )
    command.add_argument(
        "--suite",
        metavar="NAMES",
        help=f"comma-separated, of {listed(SUITES)}; default: those whose device is here",
    )
    command.add_argument(
        "--shape",
        metavar="SIZES",
        action="append",
        help="a shape of your own: 'batch,heads,length,head size' for attention, or "
        "'batch,heads,queries,keys,head size', with 32/8 for 32 heads that share 8 key heads; "
        "'rows,columns' for the norms; may be given more than once",
    )
    command.add_argument(
        "--shapes",
        metavar="FILE",
        type=Path,
        help="the calls that `record` noted, in place of suites, shapes, kinds, passes and dtypes; "
        "the end tells what they would save, by how often each came",
    )
    command.add_argument(
        "--kind",
        metavar="NAMES",
        help="only these kinds of call; for attention also any of "
        f"{listed(PARTS)}, joined by +: causal+padded+dropout",
    )
    command.add_argument(
        "--pass",
        dest="steps",
        metavar="NAMES",
        help=f"of {listed(PASSES)} (alone); default: on the CPU without the last",
    )
    command.add_argument(
        "--dtype", metavar="NAMES", help=f"of {listed(DTYPES)}; default: those of the suite"
    )
    command.add_argument(
        "--peers",
        metavar="NAMES",
        help=f"only these peers; rowmax's own, {listed(ONLY_BY_NAME)}, only if named here",
    )
    command.add_argument(
        "--function",
        metavar="MODULE:NAME",
        help="a function of yours with SDPA's signature, in a column of its own; it is examined "
        "before it is timed, called with other values each time, and some of the calls that were "
        "timed are judged",
    )
    command.add_argument(
        "--backend", default="auto", help="of rowmax.kernels; default: %(default)s"
    )
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument(
        "--seconds", type=float, help="to spend on timing each line; default: 4, quick: 1"
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds, fewer shapes, and no peer that is compiled by torch",
    )
    command.add_argument(
        "--shape-by-shape", action="store_true", help="all kinds of a shape before the next shape"
    )
    command.add_argument(
        "--stop-after", type=float, metavar="SECONDS", help="begin no further shape after this"
    )
    command.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        default=300.0,
        help="on a GPU, where each shape has a process of its own: end it then; default: 300",
    )
    command.add_argument(
        "--json", metavar="FILE", type=Path, help="write the results here too, line by line"
    )
    command.add_argument(
        "--csv", metavar="FILE", type=Path, help="append a line for each timing to this history"
    )
    command.add_argument(
        "--html", metavar="FILE", type=Path, help="write a self-contained page with charts"
    )
    command.add_argument(
        "--no-pin",
        action="store_true",
        help="leave the choice of CPUs to the system; by default the process keeps to one CPU a "
        "core, as many as it has threads, where there are more",
    )
    command.add_argument(
        "--memory",
        choices=("fresh", "kept"),
        default="fresh",
        help="of results on the CPU: as the C library's own settings have it, with the cost of "
        "fresh pages (default), or kept by the process from call to call",
    )
    command.set_defaults(run=speed)
    for name, module in _COMMANDS.items():
        module.add_command(commands)
        commands.choices[name].set_defaults(run=module.run)
    return parser


def speed(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    counts: Counter[Case] = Counter()
    if options.shapes is None:
        suites = _chosen_suites(options)
        cases = _chosen_cases(options, suites)
    else:
        counts = _recorded(options)
        cases = sorted(counts, key=lambda c: (c.suite.name, str(c.dtype), c.kind, c.shape, c.step))
        suites = _unique(case.suite for case in cases)
    peers = _chosen_peers(options, suites)
    check_backend(options.backend)
    if options.function is not None and not any(suite.attention for suite in suites):
        raise UsageError("--function: attention is all that it is timed at")
    budget = _budget(options)
    stop_after = seconds_of("--stop-after", options.stop_after)
    seconds_of("--limit", options.limit)
    set_threads(options.threads)
    if options.csv is not None:
        history.check(options.csv)
    check_outputs({"--json": options.json, "--html": options.html, "--csv": options.csv})
    with pinned(torch.get_num_threads(), wanted=not options.no_pin) as cpus:
        if options.function is not None and not any(suite.on_gpu for suite in suites):
            stranger_of(options.function)  # on a GPU, each process imports it
        return _measure(options, suites, peers, cases, budget, stop_after, cpus, counts)


def _measure(
    options: argparse.Namespace,
    suites: Sequence[Suite],
    peers: Sequence[str],
    cases: Sequence[Case],
    budget: Budget,
    stop_after: float | None,
    cpus: list[int] | None,
    counts: Mapping[Case, int],
) -> int:
    started = perf_counter()
    memory = "kept" if options.memory == "kept" and keep_freed_memory() else "fresh"
    settings = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": options.backend,
        "peers": peers,
        "function": options.function,
        "quick": options.quick,
        "seconds_a_line": budget.seconds,
        "pinned_to_cpus": cpus,
        "memory": memory,
    }
    watch = Watch()
    probed = not all(suite.on_gpu for suite in suites)  # a GPU's events know no host
    if probed:
        watch.probe()
    machine = describe()
    if any(suite.on_gpu for suite in suites):
        machine["gpu"] = gpu.describe()
    limits = _measure_limits(suites)
    _print(report.machine_lines(machine, limits, suites))
    rows: list[Row] = []
    printed: set[str] = set()  # reasons for what is missing, each of which is printed once

    def complained() -> list[str]:
        noisy = sum(map(report.is_noisy, rows))
        load = machine["load_average"] if probed else None
        return complaints(watch, noisy, len(rows), load)

    def document() -> dict[str, Any]:
        noise = {**watch.as_json(), "complaints": complained()}
        return report.document(rows, machine, limits, settings, load_average(), noise)

    def is_over() -> bool:
        return stop_after is not None and perf_counter() - started > stop_after

    for (suite, dtype), suite_cases in itertools.groupby(cases, key=lambda c: (c.suite, c.dtype)):
        if is_over():
            break
        columns = [name for name in peers_of(suite) if name in peers]
        if options.function is not None and suite.attention:
            columns.append(options.function)
        _print(report.header_lines(suite, dtype, columns))
        kind = None
        for _, group in itertools.groupby(suite_cases, key=lambda case: (case.kind, case.shape)):
            if is_over():
                break
            same = list(group)
            if same[0].kind != kind:
                kind = same[0].kind
                _print([report.kind_line(same[0])])
            measured = (same, peers, options.backend, budget, limits[suite.device])
            for row in (
                isolated_rows(*measured, options.limit, options.function)
                if suite.on_gpu
                else rows_of(*measured, options.function)
            ):
                if probed:
                    watch.probe()
                rows.append(row)
                _print(report.row_lines(row, columns, printed))
                if options.json is not None:
                    _write_json(options.json, document())
    _print(report.detail_lines(rows))
    _print(report.summary_lines(rows))
    if counts:
        _print(saving.lines(rows, counts))
    if len(rows) < len(cases):
        _print([f"stopped after {stop_after:g} seconds: {len(cases) - len(rows)} lines not begun"])
    _print(report.noise_lines(complained(), cpus, watch, memory))
    if options.html is not None:
        options.html.write_text(speed_page.html(document()), encoding="utf-8")
    if options.csv is not None:
        history.append(options.csv, document())
    return 1 if any(row.failed for row in rows) else 0


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _measure_limits(suites: Iterable[Suite]) -> dict[str, Limits]:
    """By the device of the suites."""
    limits: dict[str, Limits] = {}
    for suite in suites:
        if suite.device in limits:
            continue
        if suite.on_gpu:
            limits[suite.device] = gpu.measure_limits(suite.dtypes[0], timer_for(suite.device))
        else:
            limits[suite.device] = measure_limits()
    return limits


def _chosen_suites(options: argparse.Namespace) -> list[Suite]:
    names = names_of("--suite", options.suite, SUITES)
    has_gpu = torch.cuda.is_available()
    if options.suite is None:
        names = [name for name in names if has_gpu or not SUITES[name].on_gpu]
    for name in names:
        if SUITES[name].on_gpu and not has_gpu:
            raise UsageError(f"--suite: {name} needs a GPU, and torch sees none")
    suites = [SUITES[name] for name in names]
    if options.dtype is not None:
        dtypes = tuple(DTYPES[name] for name in names_of("--dtype", options.dtype, DTYPES))
        suites = [replace(suite, dtypes=dtypes) for suite in suites]
    shapes = _shapes(options)
    for shape in shapes:
        if not any(suite.takes(shape) for suite in suites):
            expected = "; ".join(f"{name}: {','.join(SUITES[name].dimensions)}" for name in names)
            raise UsageError(f"--shape: expected {expected}; got {shape_text(shape)}")
    return [suite for suite in suites if not shapes or any(map(suite.takes, shapes))]


def _recorded(options: argparse.Namespace) -> Counter[Case]:
    """The cases of --shapes, by how often each call came; tells on standard error what is none."""
    for option in ("suite", "shape", "kind", "steps", "dtype"):
        if getattr(options, option) is not None:
            name = "pass" if option == "steps" else option
            raise UsageError(f"--{name}: not with --shapes, whose calls say it")
    counts, left_out = saving.cases_of(calls.read(options.shapes), DTYPES)
    for reason in left_out:
        print(f"{_PREFIX}--shapes: {reason}", file=sys.stderr)
    if not counts:
        raise UsageError(f"--shapes: {options.shapes} holds no call that is measured here")
    if any(case.suite.on_gpu for case in counts) and not torch.cuda.is_available():
        raise UsageError(f"--shapes: {options.shapes} holds calls on a GPU, and torch sees none")
    return counts


def _chosen_peers(options: argparse.Namespace, suites: Sequence[Suite]) -> list[str]:
    known = _unique(name for suite in suites for name in suite.peers)
    names = names_of("--peers", options.peers, known)
    missing = [name for name in names if absent(name)]
    if options.peers is not None:
        if missing:
            raise UsageError(f"--peers: not installed here: {listed(missing)}; {HOW_TO_GET_PEERS}")
        return names
    names = [name for name in names if name not in missing]
    left_out = (*ONLY_BY_NAME, *(SLOW_TO_START if options.quick else ()))
    return [name for name in names if name not in left_out]


def _chosen_cases(options: argparse.Namespace, suites: Sequence[Suite]) -> list[Case]:
    kinds = _kinds(options, suites)
    steps = None if options.steps is None else names_of("--pass", options.steps, PASSES)
    own = _shapes(options)
    cases: list[Case] = []
    for suite in suites:
        suite_cases = cases_of(
            suite,
            suite.dtypes,
            [kind for kind in kinds if kind in suite.kinds or (suite.attention and _joined(kind))],
            suite.steps if steps is None else steps,
            [shape for shape in own if suite.takes(shape)],
            quick=options.quick,
        )
        if options.shape_by_shape:
            shapes = _unique(case.shape for case in suite_cases)
            suite_cases.sort(
                key=lambda case: (suite.dtypes.index(case.dtype), shapes.index(case.shape))
            )
        cases += suite_cases
    if not cases:
        raise UsageError("nothing to measure: no chosen kind suits a chosen shape")
    return cases


def _kinds(options: argparse.Namespace, suites: Sequence[Suite]) -> list[str]:
    """The suites' own, or those of --kind, in that order, with combinations of parts."""
    known = _unique(kind for suite in suites for kind in suite.kinds)
    if options.kind is None:
        return known
    chosen = [current_name("--kind", kind.strip()) for kind in options.kind.split(",")]
    has_attention = any(suite.attention for suite in suites)
    known += [kind for kind in chosen if has_attention and _joined(kind)]
    return sorted(names_of("--kind", ",".join(chosen), _unique(known)), key=chosen.index)


def _joined(kind: str) -> bool:
    return parts_of(kind) <= set(PARTS)


def _shapes(options: argparse.Namespace) -> list[Shape]:
    shapes = []
    for text in options.shape or ():
        try:
            shape = _shape(text)
        except ValueError as error:
            raise UsageError(
                "--shape: expected positive whole numbers like 8,8,512,64 or 16,32/8,1,1024,128, "
                f"got {text}"
            ) from error
        if len(shape) == 6 and shape[1] % shape[2] != 0:
            raise UsageError(f"--shape: expected heads that {shape[2]} divides, got {text}")
        shapes.append(shape)
    return shapes


def _shape(text: str) -> Shape:
    """The numbers in `text`; those of `heads/key heads` only among five."""
    fields = text.split(",")
    if len(fields) == 5 and "/" in fields[1]:
        fields[1:2] = fields[1].split("/", 1)
    shape = tuple(int(size) for size in fields)
    if min(shape) < 1:
        raise ValueError(text)
    return shape


def _budget(options: argparse.Namespace) -> Budget:
    budget = QUICK if options.quick else FULL
    seconds = seconds_of("--seconds", options.seconds)
    return budget if seconds is None else replace(budget, seconds=seconds)


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)
