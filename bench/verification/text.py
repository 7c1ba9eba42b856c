"""The report as text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import torch

from ...kernels.testing.tolerance import FACTOR, ULP_BINS
from ..options import listed
from .mutation import Mutation
from .outcome import Judged, Report
from .questions import Verdict, dtype_text

WIDTH = 100
MOST_FAILURES = 20  # of a subject that are told; the JSON holds all


def lines(report: Report) -> list[str]:
    machine = report.machine
    version = machine["packages"]["torch"]
    found = [f"{machine['cpu']}, {machine['torch_threads']} threads, torch {version}"]
    if report.oracle:
        worst = max(report.oracle, key=lambda check: check.error)
        verdict = "ok" if all(check.passed for check in report.oracle) else "WRONG"
        found.append(
            f"the float64 oracle against mpmath, 50 digits, {len(report.oracle)} small cases: "
            f"largest error {worst.error:.1e}, {verdict}"
        )
    for subject in report.judged:
        found += subject_lines(subject)
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


def subject_lines(subject: Judged) -> list[str]:
    found = ["", subject.name, "=" * len(subject.name)]
    if subject.verdicts:
        found += _wrapped(
            "error / the naive path's error in the same dtype, the worst of all shapes and "
            f"tensors; at most {FACTOR:.0f}, plus rounding, passes  (+: passes by the rounding "
            "allowed; FAIL: too far off; -: declined)",
            "",
        )
        found += _ratio_table(subject.verdicts)
        found += _declined(subject.verdicts)
        found += _histogram_table(subject)
    if subject.invariants:
        found += _invariant_table(subject)
    failures = subject.failures
    if failures:
        found.append(f"failures: {len(failures)}")
        for failure in failures[:MOST_FAILURES]:
            found += _wrapped(failure, "  ")
        if len(failures) > MOST_FAILURES:
            found.append(f"  ... and {len(failures) - MOST_FAILURES} more")
    return found


def verbose_line(verdict: Verdict) -> str:
    """One case: its worst tensor in all the measures."""
    head = f"{verdict.case.text():<58.58}"
    if verdict.declined is not None:
        return f"{head} declined"
    if verdict.error is not None or not verdict.judgements:
        return f"{head} {verdict.error or 'no results'}"[:WIDTH]
    worst = max(verdict.judgements, key=lambda found: (found.fault is not None, found.of_limit))
    mark = "ok" if verdict.passed else "FAIL"
    return (
        f"{head} {worst.tensor:<7.7}{worst.largest:8.1e}{worst.relative_rms:8.1e}"
        f"{min(worst.ulps, 9999):5.0f}{worst.ratio:6.2f} {mark}"
    )


VERBOSE_HEADING = f"{'case':<58} {'worst':<7}{'max':>8}{'rel rms':>8}{'ulp':>5}{'ratio':>6}"


def _ratio_table(verdicts: Sequence[Verdict]) -> list[str]:
    dtypes = list(dict.fromkeys(verdict.case.dtype for verdict in verdicts))
    found = []
    for op in dict.fromkeys(verdict.case.op for verdict in verdicts):
        of_op = [verdict for verdict in verdicts if verdict.case.op == op]
        if all(verdict.declined is not None for verdict in of_op):
            continue
        columns = "".join(f"{dtype_text(dtype):>10}" for dtype in dtypes)
        found += ["", f"{op:<19}{columns}   worst at"]
        for kind in dict.fromkeys(verdict.case.kind for verdict in of_op):
            of_kind = [verdict for verdict in of_op if verdict.case.kind == kind]
            cells = "".join(
                f"{_cell([v for v in of_kind if v.case.dtype == dtype]):>10}" for dtype in dtypes
            )
            room = WIDTH - 19 - 10 * len(dtypes) - 3
            found.append(f" {kind:<18}{cells}   {_worst(of_kind)[:room]}".rstrip())
    return found


def _cell(verdicts: Iterable[Verdict]) -> str:
    verdicts = [verdict for verdict in verdicts if verdict.declined is None]
    if not verdicts:
        return "-"
    if not all(verdict.passed for verdict in verdicts):
        return "FAIL"
    ratio = max(verdict.ratio for verdict in verdicts)
    return f"{ratio:.2f}" + ("+" if ratio > FACTOR else "")


def _worst(verdicts: Iterable[Verdict]) -> str:
    found = [(v, j) for v in verdicts for j in v.judgements]
    if not found:
        return ""
    verdict, judgement = max(found, key=lambda pair: (pair[1].fault is not None, pair[1].ratio))
    sizes = ",".join(map(str, verdict.case.shape))
    return f"{judgement.tensor} ({sizes}) {dtype_text(verdict.case.dtype)}"


def _declined(verdicts: Sequence[Verdict]) -> list[str]:
    reasons: dict[str, int] = {}
    for verdict in verdicts:
        if verdict.declined is not None:
            reasons[verdict.declined] = reasons.get(verdict.declined, 0) + 1
    found: list[str] = []
    if reasons:
        found.append("")
    for reason, count in reasons.items():
        found += _wrapped(f"declined, {count} cases: {reason}", "")
    return found


def _histogram_table(subject: Judged) -> list[str]:
    edges = [f"{edge:g}" for edge in ULP_BINS[:-1]]
    heads = "".join(f"{edge:>6}" for edge in edges) + "  more"
    found = ["", f"{'error in ulp, % up to':<22}{heads}"]
    for (dtype, what), counts in subject.histograms().items():
        total = max(1, sum(counts))
        cells = "".join(f"{_percent(count, total):>6}" for count in counts)
        found.append(f" {dtype_text(dtype) + ', ' + what:<21}{cells}")
    return found


def _percent(count: int, total: int) -> str:
    if count == 0:
        return "."
    share = 100 * count / total
    return "<0.1" if share < 0.1 else f"{share:.1f}"


def _invariant_table(subject: Judged) -> list[str]:
    dtypes = list(dict.fromkeys(found.dtype for found in subject.invariants))
    cells: dict[tuple[str, str], dict[torch.dtype, str]] = {}
    for found in subject.invariants:
        text = "-" if found.declined is not None else "ok" if found.passed else "FAIL"
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
    found = ["", "mutation check: broken kernels, each of which the suite must reject"]
    dtypes = list(dict.fromkeys(mutation.dtype for mutation in mutations))
    found.append(f" {'':<26}" + "".join(f"{dtype_text(dtype):>10}" for dtype in dtypes))
    for fault in dict.fromkeys(mutation.fault for mutation in mutations):
        same = {mutation.dtype: mutation for mutation in mutations if mutation.fault == fault}
        cells = "".join(f"{_fate(same.get(dtype)):>10}" for dtype in dtypes)
        what = next(iter(same.values())).what
        room = WIDTH - 29 - 10 * len(dtypes)
        found.append(f" {fault:<26}{cells}  {textwrap.shorten(what, room, placeholder='...')}")
    broken = [mutation for mutation in mutations if not mutation.control]
    living = [mutation for mutation in broken if not mutation.passed]
    found.append(f" rejected: {len(broken) - len(living)} of {len(broken)}")
    if living:
        names = listed(f"{one.fault} ({dtype_text(one.dtype)})" for one in living)
        found += _wrapped(f"NOT NOTICED: {names}", " ")
    return found


def _fate(mutation: Mutation | None) -> str:
    if mutation is None:
        return "no fault"
    if mutation.control:
        return "passes" if mutation.passed else "FAILS"
    if mutation.passed:
        return "rejected"
    return "LIVES"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )
