"""`python -m rowmax.bench`: the command line. Exit status 2 is a wrong call, 1 a failed check."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch

from . import report
from .cases import PASSES, SUITES, Case, Shape, Suite, cases_of, shape_text
from .machine import describe, load_average, measure_limits
from .peers import PEERS, SLOW_TO_START
from .runner import Row, candidates, run_case
from .timing import Budget

FULL = Budget(seconds=4.0, least_rounds=5, most_rounds=200)
QUICK = Budget(seconds=1.0, least_rounds=3, most_rounds=50)

T = TypeVar("T")


class UsageError(Exception):
    """A call that can't be meant; its text goes to the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return speed(options)
    except UsageError as error:
        parser.exit(2, f"rowmax.bench: {error}\n")


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
        epilog="example: python -m rowmax.bench speed --shape 8,8,512,64 --kind plain,dropout",
    )
    command.add_argument(
        "--suite", metavar="NAMES", help=f"comma-separated, of {_list(SUITES)}; default: all"
    )
    command.add_argument(
        "--shape",
        metavar="SIZES",
        action="append",
        help="a shape of your own: 'batch,heads,length,head size' for attention, 'rows,columns' "
        "for the norms; may be given more than once",
    )
    command.add_argument("--kind", metavar="NAMES", help="only these kinds of call")
    command.add_argument("--pass", dest="steps", metavar="NAMES", help=f"of {_list(PASSES)}")
    command.add_argument("--peers", metavar="NAMES", help="only these peers")
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
        help="fewer rounds, without torch.compile and without the longest sequences",
    )
    command.add_argument("--json", metavar="FILE", type=Path, help="write the results here too")
    return parser


def speed(options: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    suites = _chosen_suites(options)
    peers = _chosen_peers(options, suites)
    cases = _chosen_cases(options, suites)
    _check_backend(options.backend)
    budget = _budget(options)
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.json is not None:
        _check_writable(options.json)

    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = describe()
    sizes = [case.shape[0] * case.shape[1] for case in cases if case.suite == "cpu-norms"]
    limits = measure_limits(sizes)
    _print(report.machine_lines(machine, limits))
    rows: list[Row] = []
    for case, is_first in _with_first(cases):
        if is_first:
            _print(report.header_lines(case.suite))
        functions = candidates(case, peers, options.backend)
        rows.append(run_case(case, functions, budget, limits))
        _print(report.row_lines(rows[-1]))
    _print(report.summary_lines(rows))
    if options.json is not None:
        settings = {
            "started": started,
            "backend": options.backend,
            "peers": peers,
            "quick": options.quick,
            "seconds_a_line": budget.seconds,
        }
        text = report.as_json(rows, machine, limits, settings, load_average())
        options.json.write_text(text, encoding="utf-8")
    return 1 if any(row.faults for row in rows) else 0


def _chosen_suites(options: argparse.Namespace) -> list[Suite]:
    names = _names("--suite", options.suite, SUITES)
    shapes = _shapes(options)
    suites = [SUITES[name] for name in names]
    if shapes:
        fitting = {len(shape) for shape in shapes}
        suites = [suite for suite in suites if len(suite.dimensions) in fitting]
        for shape in shapes:
            if not any(len(suite.dimensions) == len(shape) for suite in suites):
                expected = "; ".join(
                    f"{name}: {','.join(SUITES[name].dimensions)}" for name in names
                )
                raise UsageError(f"--shape: expected {expected}; got {shape_text(shape)}")
    return suites


def _chosen_peers(options: argparse.Namespace, suites: Sequence[Suite]) -> list[str]:
    known = _unique(name for suite in suites for name in PEERS[suite.name])
    names = _names("--peers", options.peers, known)
    if options.quick and options.peers is None:
        names = [name for name in names if name not in SLOW_TO_START]
    return names


def _chosen_cases(options: argparse.Namespace, suites: Sequence[Suite]) -> list[Case]:
    kinds = _names("--kind", options.kind, _unique(kind for s in suites for kind in s.kinds))
    steps = _names("--pass", options.steps, PASSES)
    own = _shapes(options)
    cases: list[Case] = []
    for suite in suites:
        shapes = [shape for shape in own if len(shape) == len(suite.dimensions)]
        if not own:
            shapes = list(suite.quick_shapes if options.quick else suite.shapes)
        cases += cases_of(suite, shapes, kinds, steps)
    return cases


def _shapes(options: argparse.Namespace) -> list[Shape]:
    shapes = []
    for text in options.shape or ():
        try:
            shape = tuple(int(size) for size in text.split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            raise UsageError(
                f"--shape: expected positive whole numbers like 8,8,512,64, got {text}"
            )
        shapes.append(shape)
    return shapes


def _budget(options: argparse.Namespace) -> Budget:
    budget = QUICK if options.quick else FULL
    if options.seconds is None:
        return budget
    if not options.seconds > 0:
        raise UsageError(f"--seconds: expected a positive number, got {options.seconds}")
    return Budget(options.seconds, budget.least_rounds, budget.most_rounds)


def _check_backend(name: str) -> None:
    from ..kernels import dispatch

    if name == "auto":
        return
    if name not in dispatch.NAMES:
        raise UsageError(f"--backend: expected one of auto, {_list(dispatch.NAMES)}, got {name}")
    reason = dispatch.unavailable(name)
    if reason is not None:
        raise UsageError(f"--backend: {name} does not work here: {reason}")


def _check_writable(path: Path) -> None:
    """Finds out before the measurement, not after it."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(f"--json: can't write {path}: {error.strerror}") from error


def _names(option: str, text: str | None, known: Sequence[str] | dict[str, Suite]) -> list[str]:
    """The names in `text`, or all of them; in the order of `known`."""
    if text is None:
        return list(known)
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in known:
            raise UsageError(f"{option}: expected names of {_list(known)}; got {name!r}")
    return [name for name in known if name in asked]


def _list(names: Sequence[str] | dict[str, Suite]) -> str:
    return ", ".join(names)


def _unique(values: Iterator[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _with_first(cases: Sequence[Case]) -> Iterator[tuple[Case, bool]]:
    """Each case, and whether its suite begins with it."""
    seen: set[str] = set()
    for case in cases:
        yield case, case.suite not in seen
        seen.add(case.suite)


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)
