"""The report of `verify` as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.testing.cases import dtype_text
from ...kernels.testing.tolerance import FACTOR, SUMMATION, ULP_BINS
from ..render import document
from ..render.charts import columns, strips
from .outcome import Findings, Report

MAX_FAILURES = 100


def html(report: Report) -> str:
    return document.page("rowmax verify", _body(report))


def _body(report: Report) -> Iterator[str]:
    machine = report.machine
    yield document.paragraph(
        f"{machine['cpu']}, {machine['torch_threads']} threads, torch "
        f"{machine['packages']['torch']}, rowmax {machine['packages']['rowmax']}; "
        f"{report.seconds:.0f} s",
        "soft",
    )
    if report.passed:
        yield document.paragraph("✓ passed: nothing was found wrong", "good")
    else:
        yield document.paragraph(f"✗ {len(report.failures)} findings", "bad")
        yield document.table(["findings"], [[text] for text in report.failures[:MAX_FAILURES]])
    yield document.paragraph(
        "Every result and gradient is compared with a float64 oracle. The ratio is its error over "
        "the error that the naive path makes in the same dtype on the same inputs, the worse of "
        f"the largest and the root mean square. It passes up to {FACTOR:g} (the dashed line), plus "
        f"rounding: one eps of the result and {SUMMATION:g} eps of float32 of the terms summed."
    )
    for findings in report.findings:
        yield from _implementation(findings)
    if report.oracle:
        yield document.heading("The oracle against mpmath, 50 digits")
        rows = [
            ["✓ " + check.name if check.passed else "✗ " + check.name, f"{check.error:.1e}"]
            for check in report.oracle
        ]
        yield document.table(["case", "largest relative error"], rows)
    if report.mutations:
        yield document.heading("Mutation check")
        yield document.paragraph(
            "Kernels broken on purpose. Each must be rejected by the same suite and tolerance; "
            "one that lives would make every pass above worthless."
        )
        yield document.table(
            ["fault", "dtype", "", "what is wrong", "first rejected by"],
            [
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


def _implementation(findings: Findings) -> Iterator[str]:
    yield document.heading(findings.name)
    if findings.runs:
        yield document.charts([*_ratios(findings), *_histograms(findings)])
    if findings.invariants:
        rows = [
            [one.op, one.name, dtype_text(one.dtype), "✓" if one.passed else f"✗ {one.fault}"]
            for one in findings.invariants
            if one.declined is None
        ]
        yield document.table(["function", "invariant", "dtype", "holds"], rows)


def _ratios(findings: Findings) -> Iterator[str]:
    """A chart a function: a dot for each case, by kind."""
    dtypes = list(dict.fromkeys(run.case.dtype for run in findings.runs))
    for op in dict.fromkeys(run.case.op for run in findings.runs):
        rows: dict[str, list[tuple[float, int, str]]] = {}
        for run in findings.runs:
            if run.case.op == op and run.declined is None:
                worst = max(run.accuracies, key=lambda one: one.ratio, default=None)
                text = str(run.case)
                if worst is not None:
                    text += (
                        f": {worst.tensor} {worst.ratio:.2f}, largest error {worst.largest:.1e}, "
                        f"relative rms {worst.relative_rms:.1e}, {worst.ulps:.1f} ulp"
                    )
                series = dtypes.index(run.case.dtype)
                rows.setdefault(run.case.kind, []).append((run.ratio, series, text))
        if rows:
            names = ", ".join(
                f"{colour} {dtype_text(dtype)}"
                for dtype, colour in zip(
                    dtypes, ("blue", "orange", "green", "violet"), strict=False
                )
            )
            yield strips(f"{op}: error / naive error", rows, f"ratio ({names})", FACTOR)


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
