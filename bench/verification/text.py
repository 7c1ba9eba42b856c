"""The report as text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from ...kernels.testing.cases import dtype_text
from ...kernels.testing.tolerance import FACTOR, ULP_BINS
from ..options import listed
from .cheats import CHEATS
from .mutation import Mutation
from .outcome import Findings, Report
from .runs import Run

WIDTH = 100
_NOT_PROMISED = "n.p."
MAX_FAILURES = 20  # of an implementation that are listed; the JSON holds all


def lines(report: Report) -> list[str]:
    machine = report.machine
    version = machine["packages"]["torch"]
    found = [f"{machine['cpu']}, {machine['torch_threads']} threads, torch {version}"]
    if report.oracle:
        worst = max(report.oracle, key=lambda check: check.error)
        run = "ok" if all(check.passed for check in report.oracle) else "WRONG"
        found.append(
            f"the float64 oracle against mpmath, 50 digits, {len(report.oracle)} small cases: "
            f"largest error {worst.error:.1e}, {run}"
        )
    for findings in report.findings:
        found += implementation_lines(findings)
    if report.mutations:
        found += mutation_lines(report.mutations)
    found.append("")
    failures = report.failures
    took = f"in {report.seconds:.0f} s, {report.processor_seconds:.0f} s of processor time"
    if report.passed:
        found.append(f"passed, {took}")
    else:
        found.append(f"FAILED: {len(failures)} findings, {took}")
    return found


def implementation_lines(findings: Findings) -> list[str]:
    found = ["", findings.name, "=" * len(findings.name)]
    if findings.runs:
        found += _wrapped(
            "error / what is allowed, the worst of all shapes and tensors: 1 is the limit  (FAIL: "
            "too far off; -: declined); x naive: error / the naive path's error in the same dtype, "
            f"of which {FACTOR:.0f} times are allowed, and rounding",
            "",
        )
        found += _ratio_table(findings.runs)
        found += _declined(findings.runs)
        found += _histogram_table(findings)
    if findings.invariants:
        found += _invariant_table(findings)
    unkept = findings.not_promised
    if unkept:
        found.append(f"n.p.: not promised by the contract asked for: {len(unkept)}")
        for text in unkept[:MAX_FAILURES]:
            found += _wrapped(text, "  ")
    failures = findings.failures
    if failures:
        found.append(f"failures: {len(failures)}")
        for failure in failures[:MAX_FAILURES]:
            found += _wrapped(failure, "  ")
        if len(failures) > MAX_FAILURES:
            found.append(f"  ... and {len(failures) - MAX_FAILURES} more")
    return found


def verbose_line(run: Run) -> str:
    """One case: its worst tensor in all the measures."""
    head = f"{run.case!s:<58.58}"
    if run.declined is not None:
        return f"{head} declined"
    if run.error is not None or not run.accuracies:
        return f"{head} {run.error or 'no results'}"[:WIDTH]
    worst = max(run.accuracies, key=lambda found: (found.fault is not None, found.of_limit))
    mark = "ok" if run.passed else "FAIL"
    return (
        f"{head} {worst.tensor:<7.7}{worst.largest:8.1e}{worst.relative_rms:8.1e}"
        f"{min(worst.ulps, 9999):5.0f}{worst.of_limit:6.2f} {mark}"
    )


VERBOSE_HEADING = f"{'case':<58} {'worst':<7}{'max':>8}{'rel rms':>8}{'ulp':>5}{'limit':>6}"


def _ratio_table(runs: Sequence[Run]) -> list[str]:
    dtypes = list(dict.fromkeys(run.case.dtype for run in runs))
    found = []
    for op in dict.fromkeys(run.case.op for run in runs):
        of_op = [run for run in runs if run.case.op == op]
        if all(run.declined is not None for run in of_op):
            continue
        columns = "".join(f"{dtype_text(dtype):>10}" for dtype in dtypes)
        found += ["", f"{op:<19}{columns}{'x naive':>9}   worst at"]
        for kind in dict.fromkeys(run.case.kind for run in of_op):
            of_kind = [run for run in of_op if run.case.kind == kind]
            cells = "".join(
                f"{_cell([v for v in of_kind if v.case.dtype == dtype]):>10}" for dtype in dtypes
            )
            room = WIDTH - 19 - 10 * len(dtypes) - 9 - 3
            done = [run.ratio for run in of_kind if run.declined is None]
            ratio = f"{max(done):.2f}" if done else "-"
            line = f" {kind:<18}{cells}{ratio:>9}   {_worst(of_kind)[:room]}"
            found.append(line.rstrip())
    return found


def _cell(runs: Iterable[Run]) -> str:
    runs = [run for run in runs if run.declined is None]
    if not runs:
        return "-"
    if any(run.failed for run in runs):
        return "FAIL"
    if not all(run.passed for run in runs):
        return _NOT_PROMISED
    return f"{max(run.of_limit for run in runs):.2f}"


def _worst(runs: Iterable[Run]) -> str:
    found = [(v, j) for v in runs for j in v.accuracies]
    if not found:
        return ""
    run, accuracy = max(found, key=lambda pair: (pair[1].fault is not None, pair[1].of_limit))
    sizes = ",".join(map(str, run.case.shape))
    return f"{accuracy.tensor} ({sizes}) {dtype_text(run.case.dtype)}"


def _declined(runs: Sequence[Run]) -> list[str]:
    reasons = Counter(run.declined for run in runs if run.declined is not None)
    found = [""] if reasons else []
    for reason, count in reasons.items():
        found += _wrapped(f"declined, {count} cases: {reason}", "")
    return found


def _histogram_table(findings: Findings) -> list[str]:
    edges = [f"{edge:g}" for edge in ULP_BINS[:-1]]
    heads = "".join(f"{edge:>6}" for edge in edges) + "  more"
    found = ["", f"{'error in ulp, % up to':<22}{heads}"]
    for (dtype, group), counts in findings.histograms().items():
        total = max(1, sum(counts))
        cells = "".join(f"{_percent(count, total):>6}" for count in counts)
        found.append(f" {dtype_text(dtype) + ', ' + group:<21}{cells}")
    return found


def _percent(count: int, total: int) -> str:
    if count == 0:
        return "."
    share = 100 * count / total
    return "<0.1" if share < 0.1 else f"{share:.1f}"


def _invariant_table(findings: Findings) -> list[str]:
    dtypes = list(dict.fromkeys(found.dtype for found in findings.invariants))
    cells: dict[tuple[str, str], dict[torch.dtype, str]] = {}
    for found in findings.invariants:
        text = "-" if found.declined is not None else "ok" if found.passed else "FAIL"
        if not found.passed and not found.promised:
            text = _NOT_PROMISED
        cells.setdefault((found.op, found.name), {})[found.dtype] = text
    columns = "".join(f"{dtype_text(dtype):>10}" for dtype in dtypes)
    result = ["", f"{'invariants':<40}{columns}"]
    for (op, name), texts in cells.items():
        if set(texts.values()) != {"-"}:
            row = "".join(f"{texts.get(dtype, ''):>10}" for dtype in dtypes)
            result.append(f" {op + ': ' + name:<39}{row}")
    return result


def mutation_lines(mutations: Sequence[Mutation]) -> list[str]:
    """Each broken kernel once, with the dtypes in which it was rejected, and by what first."""
    found = ["", "mutation check: broken kernels and cheats, each of which the suite must reject"]
    dtypes = list(dict.fromkeys(mutation.dtype for mutation in mutations))
    found.append(f" {'':<26}" + "".join(f"{dtype_text(dtype):>10}" for dtype in dtypes))
    for fault in dict.fromkeys(mutation.fault for mutation in mutations):
        same = {mutation.dtype: mutation for mutation in mutations if mutation.fault == fault}
        missing = "-" if fault in CHEATS else "no fault"
        cells = "".join(f"{_status(same.get(dtype), missing):>10}" for dtype in dtypes)
        description = next(iter(same.values())).description
        room = WIDTH - 29 - 10 * len(dtypes)
        found.append(
            f" {fault:<26}{cells}  {textwrap.shorten(description, room, placeholder='...')}"
        )
    broken = [mutation for mutation in mutations if not mutation.control]
    living = [mutation for mutation in broken if not mutation.passed]
    found.append(f" rejected: {len(broken) - len(living)} of {len(broken)}")
    if living:
        names = listed(f"{one.fault} ({dtype_text(one.dtype)})" for one in living)
        found += _wrapped(f"NOT NOTICED: {names}", " ")
    return found


def _status(mutation: Mutation | None, missing: str) -> str:
    if mutation is None:
        return missing
    if mutation.control:
        return "passes" if mutation.passed else "FAILS"
    return "rejected" if mutation.passed else "LIVES"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )
