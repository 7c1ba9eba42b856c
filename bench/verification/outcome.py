"""What a run of the suite found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.testing.tolerance import FACTOR, SUMMATION, ULP_BINS, Judgement
from .invariants import Invariant
from .mutation import Mutation
from .questions import Verdict, dtype_text

if TYPE_CHECKING:  # it needs mpmath
    from .high_precision import OracleCheck

SCHEMA = "rowmax-verify-1"


@dataclass
class Judged:
    """All that was found of one subject."""

    name: str
    verdicts: list[Verdict] = field(default_factory=list)
    invariants: list[Invariant] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        found = [
            f"{verdict.case.text()}: {fault}"
            for verdict in self.verdicts
            for fault in verdict.faults[:1]
        ]
        return found + [
            f"{one.op}, {one.name}, {dtype_text(one.dtype)}: {one.fault}"
            for one in self.invariants
            if one.fault is not None
        ]

    @property
    def answered(self) -> int:
        """Cases that it did not decline."""
        return sum(verdict.declined is None for verdict in self.verdicts)

    @property
    def passed(self) -> bool:
        return not self.failures and (self.answered > 0 or not self.verdicts)

    def judgements(self) -> Iterator[tuple[Verdict, Judgement]]:
        for verdict in self.verdicts:
            for found in verdict.judgements:
                yield verdict, found

    def histograms(self) -> dict[tuple[torch.dtype, str], tuple[int, ...]]:
        """(dtype, "outputs" or "gradients") -> elements by error in ulps, see ULP_BINS."""
        found: dict[tuple[torch.dtype, str], list[int]] = {}
        for verdict, judgement in self.judgements():
            what = "gradients" if judgement.tensor.startswith("d_") else "outputs"
            counts = found.setdefault((verdict.case.dtype, what), [0] * len(ULP_BINS))
            for at, count in enumerate(judgement.histogram):
                counts[at] += count
        return {key: tuple(counts) for key, counts in found.items()}


@dataclass
class Report:
    """The result of `verify`: print it, or take `passed`, `failures`, `as_json()`, `as_html()`.

    `passed` says that the oracle is right, that every subject passed all it was asked, and that
    no broken kernel did.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    oracle: list[OracleCheck] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)
    seconds: float = 0.0
    processor_seconds: float = 0.0  # of all threads: what a busy machine does not change

    @property
    def passed(self) -> bool:
        return not self.failures and all(subject.passed for subject in self.judged)

    @property
    def failures(self) -> list[str]:
        found = [
            f"the oracle, {check.name}: {check.worst} is {check.error:.1e} off"
            for check in self.oracle
            if not check.passed
        ]
        for subject in self.judged:
            found += [f"{subject.name}: {failure}" for failure in subject.failures]
            if subject.verdicts and not subject.answered:
                found.append(f"{subject.name}: declined every case")
        for mutation in self.mutations:
            if not mutation.passed:
                what = f"fails: {mutation.rejected_by}" if mutation.control else "is not noticed"
                found.append(f"mutant {mutation.fault}, {dtype_text(mutation.dtype)}: {what}")
        return found

    def as_json(self) -> str:
        document = {
            "schema": SCHEMA,
            "machine": self.machine,
            "settings": self.settings,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "passed": self.passed,
            "rule": {"factor": FACTOR, "summation": SUMMATION},
            "ulp_bins": [edge for edge in ULP_BINS if edge != float("inf")],
            "oracle": [check.as_json() for check in self.oracle],
            "subjects": [
                {
                    "name": subject.name,
                    "passed": subject.passed,
                    "cases": [_case(verdict) for verdict in subject.verdicts],
                    "ulp_histograms": [
                        {"dtype": dtype_text(dtype), "of": what, "counts": list(counts)}
                        for (dtype, what), counts in subject.histograms().items()
                    ],
                    "invariants": [found.as_json() for found in subject.invariants],
                }
                for subject in self.judged
            ],
            "mutations": [mutation.as_json() for mutation in self.mutations],
            "failures": self.failures,
        }
        return json.dumps(document, indent=1) + "\n"

    def as_html(self) -> str:
        """One self-contained page with plots."""
        from .page import html

        return html(self)

    def __str__(self) -> str:
        from .text import lines

        return "\n".join(lines(self))


def _case(verdict: Verdict) -> dict[str, Any]:
    case = verdict.case
    return {
        "op": case.op,
        "kind": case.kind,
        "shape": list(case.shape),
        "dtype": dtype_text(case.dtype),
        "passed": verdict.passed,
        "declined": verdict.declined,
        "error": verdict.error,
        "results": [found.as_json() for found in verdict.judgements],
    }
