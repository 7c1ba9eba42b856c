"""`python -m rowmax.bench verify`; exit status 1 where something is wrong, 2 for a wrong call."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ...kernels.backends import dispatch
from ...kernels.testing.cases import Shape
from ...kernels.testing.suite import ALL_KINDS, OPS
from ..candidate.options import FORMS, add_foreign_options, refuse_without_function, where
from ..candidate.sources import callable_of, module_of
from ..conduct.guard import Guard
from ..options import UsageError, check_backend, check_outputs, listed, names_of, set_threads, write
from ..render.markdown import add_markdown_options, check_markdown, write_markdown
from ..shapes import calls
from . import suite
from .contracts import CONTRACTS
from .implementations import Backend, Foreign, Implementation
from .model import verify_model
from .outcome import Report
from .runs import Run
from .text import VERBOSE_HEADING, lines, verbose_line


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--backend", metavar="NAMES", help="comma-separated; default: all that work here"
    )
    command.add_argument(
        "--function",
        metavar="WHERE",
        help=f"verify an attention, norm or softmax of yours instead: {FORMS}; --op tells what it "
        "is where its name does not",
    )
    command.add_argument(
        "--model",
        metavar="WHERE",
        help="a function without arguments that returns a model and its inputs, of a module or a "
        "file: whether each layer gives the same bits again, on any number of threads, and for a "
        "batch element alone; nothing else is verified then",
    )
    add_foreign_options(command)
    command.add_argument("--device", default="cpu", help="of --function; default: %(default)s")
    command.add_argument("--op", metavar="NAMES", help=f"of {listed(OPS)}")
    command.add_argument("--kind", metavar="NAMES", help=f"of {listed(ALL_KINDS)}")
    command.add_argument("--dtype", metavar="NAMES", help=f"of {listed(suite.DTYPES)}")
    command.add_argument("--check", metavar="NAMES", help=f"of {listed(suite.CHECKS)}")
    command.add_argument(
        "--shape",
        metavar="SIZES",
        action="append",
        help="B,Hq,Hkv,Lq,Lk,D,Dv of attention, in place of the suite's own; more than once",
    )
    command.add_argument(
        "--shapes",
        metavar="FILE",
        type=Path,
        help="the sizes of attention that `record` noted, in place of --shape; of a batch, two",
    )
    command.add_argument(
        "--contract",
        choices=tuple(CONTRACTS),
        default="rowmax",
        help="what is promised; of torch: no NaN kept out of padding, no bits that stay the same, "
        "and results held to the rule that `speed` has for peers; what is not promised is "
        "reported and is no failure; default: %(default)s",
    )
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument(
        "--quick", action="store_true", help="float32 and bfloat16, fewer shapes: under a minute"
    )
    command.add_argument("--verbose", action="store_true", help="a line for every case")
    command.add_argument("--json", metavar="FILE", type=Path, help="write everything found")
    command.add_argument("--html", metavar="FILE", type=Path, help="write a page with plots")
    command.add_argument("--csv", metavar="FILE", type=Path, help="write a line a result")
    add_markdown_options(command)


def run(options: argparse.Namespace) -> int:
    if options.model is not None:
        return _run_model(options)
    implementations = _implementations(options)
    settings = _settings(options)
    if options.function is not None:
        (one,) = implementations
        settings = suite.with_ops_of(settings, one)
        if not settings.ops:
            raise UsageError(f"--op: {one.name} is {listed(one.ops)}, got {options.op}")
    set_threads(options.threads)
    check_outputs({"--json": options.json, "--html": options.html, "--csv": options.csv})
    check_markdown(options)
    if options.verbose:
        print(VERBOSE_HEADING)
    with _Progress(verbose=options.verbose, html=options.html) as progress:
        report = suite.run(implementations, settings, progress)
    print("\n".join(lines(report)))
    write(options.json, report.as_json)
    write(options.html, report.as_html)
    write(options.csv, report.as_csv)
    write_markdown(options, report.as_markdown())
    return 0 if report.passed else 1


def _run_model(options: argparse.Namespace) -> int:
    for name in (
        *("function", "backend", "op", "kind", "check"),
        *("shape", "shapes", "html", "csv", "markdown"),
    ):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name}: not with --model")
    set_threads(options.threads)
    check_outputs({"--json": options.json})
    for module in options.imports:
        module_of("--import", module)
    made = callable_of("--model", options.model)()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        kind = type(made).__name__
        raise UsageError(f"--model: expected (model, inputs) of {options.model}, got a {kind}")
    chosen = {"backward": not options.forward_only, "contract": options.contract}
    report = verify_model(*made, **chosen)
    print(report)
    write(options.json, report.as_json)
    return 0 if report.passed else 1


def _settings(options: argparse.Namespace) -> suite.Settings:
    default = listed(suite.QUICK_DTYPES) if options.quick else None
    return suite.Settings(
        ops=tuple(names_of("--op", options.op, OPS)),
        kinds=tuple(names_of("--kind", options.kind, ALL_KINDS)),
        dtypes=tuple(names_of("--dtype", options.dtype or default, suite.DTYPES)),
        checks=tuple(names_of("--check", options.check, suite.CHECKS)),
        shapes=_shapes(options),
        quick=options.quick,
        contract=options.contract,
    )


def _shapes(options: argparse.Namespace) -> tuple[Shape, ...]:
    """Of --shape, or those that were recorded: the elements of a batch are no matter."""
    if options.shapes is None:
        return tuple(map(_shape, options.shape or ()))
    if options.shape is not None:
        raise UsageError("--shape: not with --shapes")
    found = [
        suite.sizes_of((min(2, call.shape[0]), *call.shape[1:]))
        for call in calls.read(options.shapes)
        if call.op == "attention"
    ]
    if not found:
        raise UsageError(f"--shapes: {options.shapes} holds no call of attention")
    return tuple(dict.fromkeys(found))


def _shape(text: str) -> Shape:
    try:
        return suite.sizes_of([int(size) for size in text.split(",")])
    except ValueError as error:
        raise UsageError(
            "--shape: expected seven positive whole numbers B,Hq,Hkv,Lq,Lk,D,Dv, Hq a multiple "
            f"of Hkv, got {text}"
        ) from error


def _implementations(options: argparse.Namespace) -> list[Implementation]:
    if options.function is not None:
        if options.backend is not None:
            raise UsageError("--backend: not with --function, which is verified in their place")
        try:
            device = torch.device(options.device)
            torch.empty(0, device=device)
        except Exception as error:
            raise UsageError(f"--device: {options.device} does not work here") from error
        guard = Guard()  # before anything of the module runs
        op = suite.named_op(names_of("--op", options.op, OPS)) if options.op else None
        candidate = where(options, op).load()
        return [Foreign(candidate, options.function, device, guard, CONTRACTS[options.contract])]
    refuse_without_function(options)
    if options.contract != "rowmax":
        raise UsageError("--contract: only with --function; backends have rowmax's")
    names = names_of("--backend", options.backend, dispatch.NAMES)
    if options.backend is None:
        names = suite.available()
    for name in names:
        check_backend(name)
    return list(map(Backend, names))


EVERY = 2.0  # seconds between the pages of a run that goes on, at least


class _Progress(suite.Listener):
    """A bar on standard error where that is a terminal; with `verbose`, a line a case.

    With `html`, a page of what was found so far, as often as takes a twentieth of the time.
    """

    def __init__(self, *, verbose: bool, html: Path | None = None) -> None:
        self._verbose = verbose
        self._html = html
        self._report: Report | None = None
        self._started = self._next = perf_counter()
        self._total = self._done = 0
        self._bar: Any = None

    def opened(self, report: Report) -> None:
        self._report = report

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, total: int) -> None:
        self._total = total
        if self._verbose or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:  # no reason to check nothing
            bar = 'pip install "rowmax[bench]" brings a progress bar'
            print(f"verify: {total} checks; {bar}", file=sys.stderr)
            return
        self._bar = tqdm(total=total, leave=False, unit=" checks")

    def step(self, description: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_description(description, refresh=False)
            self._bar.update()
        if self._html is not None and self._report is not None and perf_counter() >= self._next:
            began = perf_counter()
            so_far = f"{self._done} of {self._total} checks, at {description}"
            part = replace(self._report, unfinished=so_far, seconds=began - self._started)
            self._html.write_text(part.as_html(), encoding="utf-8")
            took = perf_counter() - began
            self._next = began + max(EVERY, 20 * took)

    def ran(self, implementation: str, run: Run) -> None:
        if self._verbose:
            print(verbose_line(run), flush=True)
