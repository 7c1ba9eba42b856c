"""The check of the check: deliberately broken kernels, each of which the suite must reject.

A tolerance that lets one of them live is too wide, whatever it says of the kernels that pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.testing.cases import NamedCase, dtype_text
from . import attention_mutants, cross_entropy_mutants, row_mutants
from .implementations import Implementation
from .runs import run

CONTROL = attention_mutants.Mutant().name


@dataclass(frozen=True)
class Mutation:
    """The result of one broken kernel in one dtype; `control` is the same kernel unbroken."""

    fault: str
    description: str
    dtype: torch.dtype
    rejected_by: str | None  # a case and what it found; None: it lives
    rejections: int  # cases that reject it, of `cases` that it was run on
    cases: int
    control: bool = False

    @property
    def passed(self) -> bool:
        return (self.rejected_by is None) == self.control

    def as_json(self) -> dict[str, Any]:
        return {
            "fault": self.fault,
            "description": self.description,
            "dtype": dtype_text(self.dtype),
            "rejected_by": self.rejected_by,
            "rejections": self.rejections,
            "cases": self.cases,
            "control": self.control,
        }


def faults_of(ops: Sequence[str], dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """Fault -> op and what is wrong, for those that are faults in this dtype."""
    found: dict[str, tuple[str, str]] = {}
    half = dtype.itemsize < 4
    if "attention" in ops:
        for name, description in attention_mutants.FAULTS.items():
            if not (half and name in attention_mutants.WIDE_ONLY):
                found[name] = "attention", description
    for name, (op, description) in row_mutants.FAULTS.items():
        if op in ops and not (half and name in row_mutants.WIDE_ONLY):
            found[name] = op, description
    if "linear_cross_entropy" in ops:
        for name, description in cross_entropy_mutants.FAULTS.items():
            if not (half and name in cross_entropy_mutants.WIDE_ONLY):
                found[name] = "linear_cross_entropy", description
    return found


def count(ops: Sequence[str], dtype: torch.dtype) -> int:
    """The number of checks that `check` makes."""
    return len(faults_of(ops, dtype)) + ("attention" in ops)


def check(
    ops: Sequence[str], dtype: torch.dtype, cases: Sequence[NamedCase], *, thorough: bool
) -> Iterator[Mutation]:
    """The unbroken kernel first, then each fault; `thorough` counts all cases that reject it."""
    if "attention" in ops:
        control = attention_mutants.Mutant()
        description = "the kernel that the others are made from, which must pass"
        yield _mutation(control, control.name, description, dtype, cases, "attention", True)
    for name, (op, description) in faults_of(ops, dtype).items():
        mutant: Implementation
        if op == "attention":
            mutant = attention_mutants.Mutant(name)
        elif op == "linear_cross_entropy":
            mutant = cross_entropy_mutants.CrossEntropyMutant(name)
        else:
            mutant = row_mutants.RowMutant(name)
        yield _mutation(mutant, name, description, dtype, cases, op, thorough)


def _mutation(
    mutant: Implementation,
    name: str,
    description: str,
    dtype: torch.dtype,
    cases: Sequence[NamedCase],
    op: str,
    thorough: bool,
) -> Mutation:
    by, rejections, runs = None, 0, 0
    for case in cases:
        if case.op != op or case.dtype != dtype:
            continue
        found = run(case, mutant)
        if found.declined is not None:
            continue
        runs += 1
        if not found.passed:
            rejections += 1
            if by is None:
                by = f"{case.kind} {case.shape}: {found.faults[0]}"
            if not thorough:
                break
    return Mutation(name, description, dtype, by, rejections, runs, name == CONTROL)
