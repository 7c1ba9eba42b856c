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
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch

from .. import console
from ..memory import keep_freed_memory
from . import speed_options
from .candidate import new
from .candidate.options import refuse_without_function, where
from .candidate.sources import Where
from .experiments import architectures, divergence
from .machine import gpu
from .machine.gpu import Limits
from .machine.host import describe, load_average, measure_limits
from .measure import comparison, decoding, history, loss, overhead, report, swap, training
from .measure.cases import (
    FORWARD,
    PARTS,
    PASSES,
    SUITES,
    Case,
    Shape,
    Suite,
    cases_of,
    parts_of,
    shape_text,
)
from .measure.noise import Watch, complaints, pinned
from .measure.runner import Row, computes, isolated_rows, rows_of, stranger_of
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
    write,
)
from .peers.candidates import HOW_TO_GET_PEERS, ONLY_BY_NAME, SLOW_TO_START, absent, peers_of
from .render import markdown, ratio_chart, speed_page
from .shapes import calls, recorder, saving
from .speed_options import DTYPES
from .tuning import configs, smoke, tune
from .verification import command as verification

FULL = Budget(seconds=4.0, min_rounds=5, max_rounds=200)
QUICK = Budget(seconds=1.0, min_rounds=3, max_rounds=50)


class Command(NamedTuple):
    """A module with the options of a command and, but of `speed`, what it does; and its --help."""

    module: Any  # with `add_options`, and `run`
    help: str
    description: str | None = None
    example: str | None = None  # its arguments
    aliases: tuple[str, ...] = ()


COMMANDS = {
    "speed": Command(
        speed_options,
        "time, share of the machine's limits, and the ratio to the fastest peer",
        "Times rowmax and its peers in turns, in one run, each after it has passed a "
        "correctness check against float64.",
        "--shape 8,8,512,64 --kind full,dropout",
    ),
    "compare": Command(
        comparison,
        "two saved results of `speed`: what became faster or slower, and how surely",
        "Compares the JSON files of two runs, case by case. Exit status 1 where one became "
        "slower by more than the threshold and the 95% intervals do not overlap, or where one "
        "is in one of the files alone.",
        "before.json after.json --threshold 10",
    ),
    "chart": Command(
        ratio_chart, "a picture of the ratios to peers, by kind, from the JSON of `speed`"
    ),
    "record": Command(
        recorder,
        "the attention and norm calls of a script, for `speed --shapes`",
        "Runs a Python script or module and notes its attention and norm calls.",
        "--out shapes.json -- python my_script.py",
    ),
    "new": Command(
        new,
        "write a file for a kernel of yours, that `verify` and `speed` take as it is",
        "Writes a file with a kernel in plain torch, to put yours into.",
        "my_kernel.py",
    ),
    "verify": Command(
        verification,
        "how close the kernels here are to float64, and whether the check itself is sound",
        "Every backend here, every function, mask, dtype and shape, forward and every "
        "gradient, against a float64 oracle; invariants; and kernels broken on purpose, which "
        "must be rejected.",
        "--quick --html verify.html",
    ),
    "diverge": Command(
        divergence,
        "two models of equal structure: where they part, layer by layer, as a page",
        "Compares every layer of two models with float64, forward and backward. Exit status 1 "
        "where a layer is further off than it may be.",
        "--models my_model.py:make --html page.html",
    ),
    "loss": Command(loss, "time and memory of linear_cross_entropy beside torch's unfused loss"),
    "overhead": Command(overhead, "microseconds of a call that has next to nothing to compute"),
    "smoke": Command(
        smoke,
        "whether each feature of the Triton kernels runs on the GPU here",
        "What the machine is and can do at most, and every feature in a process of its own "
        "against float64.",
    ),
    "swap": Command(swap, "whole models before and after rowmax.kernels.swap, on padded batches"),
    "training": Command(
        training, "training steps of the reference Transformer beside nn.Transformer"
    ),
    "decoding": Command(
        decoding, "translation by the reference Transformer beside CTranslate2 and Hugging Face"
    ),
    "tune": Command(
        tune,
        "find the configs of the Triton attention kernels",
        "Times tile sizes, warps and pipeline stages of the Triton attention kernels on the "
        "GPU that is here, and writes the fastest into the table that the kernels read.",
        "--kernel forward --dim 64,128 --seconds 300",
    ),
    "configs": Command(
        configs,
        "compile the configs of the Triton attention kernels and show what they take",
        "Compiles the Triton attention kernels, in the configs of their table, for GPUs that "
        f"need not be here, and prints what the compiler says. {configs.EXPLANATION}.",
        "--arch sm_90 --dtype bfloat16 --dim 64,128",
        aliases=("forms",),
    ),
    "model": Command(
        architectures,
        "the Transformer beside RNN, LSTM and GRU: quality, speed, time against length",
        "Trains the four architectures at about equal parameters, for the same number of steps "
        "on the same batches, with several seeds, and writes a table, a plot and JSON. Within "
        "about --minutes: the number of steps follows from the steps timed first.",
    ),
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
    for name, (module, text, description, example, aliases) in COMMANDS.items():
        epilog = None if example is None else f"example: python -m rowmax.bench {name} {example}"
        command = commands.add_parser(
            name, help=text, description=description, epilog=epilog, aliases=aliases
        )
        module.add_options(command)
        command.set_defaults(run=speed if module is speed_options else module.run)
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
    stranger = _stranger(options)
    if stranger is not None and not any(computes(case) == stranger.computes for case in cases):
        raise UsageError(f"--function: {stranger.computes} is not among what is measured")
    budget = _budget(options)
    stop_after = seconds_of("--stop-after", options.stop_after)
    seconds_of("--limit", options.limit)
    set_threads(options.threads)
    if options.csv is not None:
        history.check(options.csv)
    check_outputs({"--json": options.json, "--html": options.html, "--csv": options.csv})
    markdown.check_markdown(options)
    with pinned(torch.get_num_threads(), wanted=not options.no_pin) as cpus:
        layout = options.layout or "bhld"
        if stranger is not None and not any(suite.on_gpu for suite in suites):
            layout = stranger_of(stranger)[0].layout  # on a GPU, each process imports it
        if layout != "bhld":
            counts = Counter({replace(c, layout="blhd"): count for c, count in counts.items()})
            cases = [replace(case, layout="blhd") for case in cases]
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
        "layout": cases[0].layout,
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

    stranger = _stranger(options)
    for (suite, dtype), group_of in itertools.groupby(cases, key=lambda c: (c.suite, c.dtype)):
        if is_over():
            break
        of_suite = list(group_of)
        columns = [name for name in peers_of(suite) if name in peers]
        if stranger is not None and any(computes(c) == stranger.computes for c in of_suite):
            columns.append(stranger.name)
        _print(report.header_lines(suite, dtype, columns))
        kind = None
        for _, group in itertools.groupby(of_suite, key=lambda case: (case.kind, case.shape)):
            if is_over():
                break
            same = list(group)
            if same[0].kind != kind:
                kind = same[0].kind
                _print([report.kind_line(same[0])])
            measured = (same, peers, options.backend, budget, limits[suite.device])
            for row in (
                isolated_rows(*measured, options.limit, stranger)
                if suite.on_gpu
                else rows_of(*measured, stranger)
            ):
                if probed:
                    watch.probe()
                rows.append(row)
                _print(report.row_lines(row, columns, printed))
                write(options.json, lambda: json.dumps(document(), indent=2) + "\n")
    _print(report.detail_lines(rows))
    _print(report.summary_lines(rows))
    if counts:
        _print(saving.lines(rows, counts))
    if len(rows) < len(cases):
        _print([f"stopped after {stop_after:g} seconds: {len(cases) - len(rows)} lines not begun"])
    _print(report.noise_lines(complained(), cpus, watch, memory))
    write(options.html, lambda: speed_page.html(document()))
    if options.csv is not None:
        history.append(options.csv, document())
    markdown.write_markdown(options, markdown.of_speed(document()))
    return 1 if any(row.failed for row in rows) else 0


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


def _stranger(options: argparse.Namespace) -> Where | None:
    if options.function is None:
        refuse_without_function(options)
        if options.op is not None:
            raise UsageError("--op: only with --function")
        return None
    return where(options, options.op)


def _chosen_suites(options: argparse.Namespace) -> list[Suite]:
    names = names_of("--suite", options.suite, SUITES)
    has_gpu = torch.cuda.is_available()
    stranger = _stranger(options)
    if stranger is not None and options.suite is None:
        wanted = stranger.computes == "attention"
        names = [n for n in names if SUITES[n].attention == wanted and not SUITES[n].model]
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
    if options.forward_only and steps is None:
        steps = [FORWARD]
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
        stranger = _stranger(options)
        own = None if stranger is None else stranger.computes
        return [own] if own in known else known
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
