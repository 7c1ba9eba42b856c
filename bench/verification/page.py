"""The report of `verify` as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.testing.cases import dtype_text
from ...kernels.testing.tolerance import FACTOR, SUMMATION, ULP_BINS
from ..render.charts import columns, strips
from ..render.document import Section, page
from .invariants import Invariant
from .outcome import Findings, Report

MAX_FAILURES = 100
REFRESH = 5  # seconds after which a page of a run that goes on is loaded again
MOST = 100.0  # of what is allowed: where a dot for more of it, or for NaN, stands


def html(report: Report) -> str:
    refresh = None if report.unfinished is None else REFRESH
    return page("rowmax verify", _sections(report), refresh=refresh)


def _sections(report: Report) -> Iterator[Section]:
    machine = report.machine
    yield Section(
        text=f"{machine['cpu']}, {machine['torch_threads']} threads, torch "
        f"{machine['packages']['torch']}, rowmax {machine['packages']['rowmax']}; "
        f"{report.seconds:.0f} s",
        style="soft",
    )
    if report.unfinished is not None:
        found = len(report.failures)
        so_far = f"{found} findings so far" if found else "nothing was found wrong so far"
        yield Section(text=f"still running, {report.unfinished}: {so_far}", style="soft")
    elif report.passed:
        yield Section(text="✓ passed: nothing was found wrong", style="good")
    else:
        rows = [[text] for text in report.failures[:MAX_FAILURES]]
        text = f"✗ {len(report.failures)} findings"
        yield Section(text=text, style="bad", head=["findings"], rows=rows)
    yield Section(
        text="Every result and gradient is compared with a float64 oracle. A dot is the "
        "error of a case over what is allowed, the worse of the largest and the root mean square: "
        "up to 1, the dashed line, it passes. Allowed are "
        f"{FACTOR:g} times the error of the naive path in the same dtype on the same inputs, and "
        f"rounding: one eps of the result and {SUMMATION:g} eps of float32 of the terms summed."
    )
    yield from map(_implementation, report.findings)
    if report.oracle:
        rows = [
            ["✓ " + check.name if check.passed else "✗ " + check.name, f"{check.error:.1e}"]
            for check in report.oracle
        ]
        head = ["case", "largest relative error"]
        yield Section("The oracle against mpmath, 50 digits", head=head, rows=rows)
    if report.mutations:
        yield Section(
            "Mutation check",
            "Kernels broken on purpose, and candidates that cheat. Each must be rejected by the "
            "same suite; one that lives would make every pass above worthless.",
            head=["fault", "dtype", "", "what is wrong", "first rejected by"],
            rows=[
                [
                    one.fault,
                    dtype_text(one.dtype),
                    ("✓ " if one.passed else "✗ ")
                    + ("passes" if one.rejected_by is None else "rejected"),
                    one.description,
                    one.rejected_by or "",
                ]
                for one in report.mutations
            ],
        )


def _implementation(findings: Findings) -> Section:
    figures = [*_errors(findings), *_histograms(findings)] if findings.runs else []
    head = ["function", "invariant", "dtype", "holds"] if findings.invariants else []
    rows = [
        [one.op, one.name, dtype_text(one.dtype), _mark(one)]
        for one in findings.invariants
        if one.declined is None
    ]
    return Section(findings.name, figures=figures, head=head, rows=rows)


def _mark(one: Invariant) -> str:
    if one.passed:
        return "✓"
    return f"✗ {one.fault}" if one.promised else f"not promised: {one.fault}"


def _errors(findings: Findings) -> Iterator[str]:
    """A chart a function: a dot for each case, by kind."""
    dtypes = list(dict.fromkeys(run.case.dtype for run in findings.runs))
    for op in dict.fromkeys(run.case.op for run in findings.runs):
        rows: dict[str, list[tuple[float, int, str]]] = {}
        for run in findings.runs:
            if run.case.op == op and run.declined is None:
                worst = max(run.accuracies, key=lambda one: one.of_limit, default=None)
                text = str(run.case)
                if worst is not None:
                    text += (
                        f": {worst.tensor} {worst.of_limit:.2f} of what is allowed, "
                        f"{worst.ratio:.2f} times the naive path's; largest error "
                        f"{worst.largest:.1e}, relative rms {worst.relative_rms:.1e}, "
                        f"{worst.ulps:.1f} ulp"
                    )
                series = dtypes.index(run.case.dtype)
                rows.setdefault(run.case.kind, []).append((min(run.of_limit, MOST), series, text))
        if rows:
            names = ", ".join(
                f"{colour} {dtype_text(dtype)}"
                for dtype, colour in zip(
                    dtypes, ("blue", "orange", "green", "violet"), strict=False
                )
            )
            yield strips(f"{op}: error / allowed", rows, f"share of the limit ({names})", 1.0)


def _histograms(findings: Findings) -> Iterator[str]:
    found = findings.histograms()
    names = [*(f"{edge:g}" for edge in ULP_BINS[:-1]), "more"]
    for group in ("outputs", "gradients"):
        series = {
            dtype_text(dtype): [100 * count / max(1, sum(counts)) for count in counts]
            for (dtype, of), counts in found.items()
            if of == group
        }
        if series:
            yield columns(f"{group}: error in ulp, up to", names, series, "units in the last place")
