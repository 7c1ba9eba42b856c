"""The results of a run of the suite."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.testing.cases import dtype_text
from ...kernels.testing.tolerance import FACTOR, SUMMATION, ULP_BINS, Accuracy
from ..render.markdown import of_verify
from .invariants import Invariant
from .mutation import Mutation
from .runs import Run

if TYPE_CHECKING:  # it needs mpmath
    from .high_precision import OracleCheck

SCHEMA = "rowmax-verify-2"
CSV_FIELDS = (
    *("implementation", "op", "kind", "shape", "dtype", "tensor", "passed", "promised", "declined"),
    *("error", "fault", "of_limit", "ratio", "largest_error", "relative_rms_error"),
    *("naive_largest_error", "naive_relative_rms_error", "largest_ulps"),
)


@dataclass
class Findings:
    """All results of one implementation."""

    name: str
    runs: list[Run] = field(default_factory=list)
    invariants: list[Invariant] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return self._faults(promised=True)

    @property
    def not_promised(self) -> list[str]:
        """What would be a failure under rowmax's contract, and is none under the one asked for."""
        return self._faults(promised=False)

    def _faults(self, *, promised: bool) -> list[str]:
        runs = [run for run in self.runs if run.promised == promised]
        found = [f"{run.case}: {fault}" for run in runs for fault in run.faults[:1]]
        return found + [
            f"{one.op}, {one.name}, {dtype_text(one.dtype)}: {one.fault}"
            for one in self.invariants
            if one.fault is not None and one.promised == promised
        ]

    @property
    def done(self) -> int:
        """Cases that it did not decline."""
        return sum(run.declined is None for run in self.runs)

    @property
    def passed(self) -> bool:
        return not self.failures and (self.done > 0 or not self.runs)

    def accuracies(self) -> Iterator[tuple[Run, Accuracy]]:
        for run in self.runs:
            for found in run.accuracies:
                yield run, found

    def histograms(self) -> dict[tuple[torch.dtype, str], tuple[int, ...]]:
        """(dtype, "outputs" or "gradients") -> elements by error in ulps, see ULP_BINS."""
        found: dict[tuple[torch.dtype, str], list[int]] = {}
        for run, accuracy in self.accuracies():
            group = "gradients" if accuracy.tensor.startswith("d_") else "outputs"
            counts = found.setdefault((run.case.dtype, group), [0] * len(ULP_BINS))
            for at, count in enumerate(accuracy.histogram):
                counts[at] += count
        return {key: tuple(counts) for key, counts in found.items()}


@dataclass
class Report:
    """The result of `verify`: print it, or take `passed`, `failures`, `as_json()`, `as_html()`.

    `passed` says that the oracle is right, that every implementation passed all of its cases,
    and that no broken kernel did.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    oracle: list[OracleCheck] = field(default_factory=list)
    findings: list[Findings] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)
    seconds: float = 0.0
    processor_seconds: float = 0.0  # of all threads: what a busy machine does not change
    unfinished: str | None = None  # how far a run is that is not at its end

    @property
    def passed(self) -> bool:
        return not self.failures and all(one.passed for one in self.findings)

    @property
    def failures(self) -> list[str]:
        found = [
            f"the oracle, {check.name}: {check.worst} is {check.error:.1e} off"
            for check in self.oracle
            if not check.passed
        ]
        for one in self.findings:
            found += [f"{one.name}: {failure}" for failure in one.failures]
            if one.runs and not one.done:
                found.append(f"{one.name}: declined every case")
        for mutation in self.mutations:
            if not mutation.passed:
                outcome = f"fails: {mutation.rejected_by}" if mutation.control else "is not noticed"
                found.append(f"mutant {mutation.fault}, {dtype_text(mutation.dtype)}: {outcome}")
        return found

    @property
    def not_promised(self) -> list[str]:
        return [f"{one.name}: {text}" for one in self.findings for text in one.not_promised]

    def as_json(self) -> str:
        return json.dumps(self.as_document(), indent=1) + "\n"

    def as_markdown(self) -> str:
        """A summary for a pull request."""
        return of_verify(self.as_document())

    def as_csv(self) -> str:
        """A line for each tensor of each case, and for each case that was declined or failed."""
        text = io.StringIO()
        writer = csv.DictWriter(text, CSV_FIELDS, lineterminator="\n")
        writer.writeheader()
        for one in self.findings:
            for run in one.runs:
                case = _case(run)
                results = case.pop("results") or [{}]
                shape = "x".join(map(str, case.pop("shape")))
                for result in results:
                    found = {**case, **result, "implementation": one.name, "shape": shape}
                    writer.writerow({name: found.get(name) for name in CSV_FIELDS})
        return text.getvalue()

    def as_document(self) -> dict[str, Any]:
        """What `as_json` writes; docs/schemas has its schema."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "settings": self.settings,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "passed": self.passed,
            "rule": {"factor": FACTOR, "summation": SUMMATION},
            "ulp_bins": [edge for edge in ULP_BINS if edge != float("inf")],
            "oracle": [check.as_json() for check in self.oracle],
            "implementations": [
                {
                    "name": one.name,
                    "passed": one.passed,
                    "cases": [_case(run) for run in one.runs],
                    "ulp_histograms": [
                        {"dtype": dtype_text(dtype), "of": group, "counts": list(counts)}
                        for (dtype, group), counts in one.histograms().items()
                    ],
                    "invariants": [found.as_json() for found in one.invariants],
                }
                for one in self.findings
            ],
            "mutations": [mutation.as_json() for mutation in self.mutations],
            "failures": self.failures,
            "not_promised": self.not_promised,
        }

    def as_html(self) -> str:
        """One self-contained page with plots."""
        from .page import html

        return html(self)

    def __str__(self) -> str:
        from .text import lines

        return "\n".join(lines(self))


def _case(run: Run) -> dict[str, Any]:
    case = run.case
    return {
        "op": case.op,
        "kind": case.kind,
        "shape": list(case.shape),
        "dtype": dtype_text(case.dtype),
        "passed": run.passed,
        "declined": run.declined,
        "error": run.error,
        "promised": run.promised,
        "results": [found.as_json() for found in run.accuracies],
    }
