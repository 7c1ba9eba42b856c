"""The check of the check: deliberately broken kernels, each of which the suite must reject.

A tolerance that lets one of them live is too wide, whatever it says of the kernels that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.testing.cases import NamedCase, dtype_text
from . import attention_mutants, cross_entropy_mutants, row_mutants
from .implementations import Implementation
from .runs import run

CONTROL = attention_mutants.Mutant().name
LOSS = "linear_cross_entropy"
_MUTANTS: dict[str, Callable[[str], Implementation]] = {
    "attention": attention_mutants.Mutant,
    LOSS: cross_entropy_mutants.CrossEntropyMutant,
}
# Faults that rounding hides in half precision.
WIDE_ONLY = attention_mutants.WIDE_ONLY | row_mutants.WIDE_ONLY | cross_entropy_mutants.WIDE_ONLY


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
        return {**vars(self), "dtype": dtype_text(self.dtype)}


def faults_of(ops: Sequence[str], dtype: torch.dtype) -> dict[str, tuple[str, str]]:
    """Fault -> op and what is wrong, for those that are faults in this dtype."""
    known = {
        **{name: ("attention", text) for name, text in attention_mutants.FAULTS.items()},
        **row_mutants.FAULTS,
        **{name: (LOSS, text) for name, text in cross_entropy_mutants.FAULTS.items()},
    }
    left_out = WIDE_ONLY if dtype.itemsize < 4 else ()
    return {n: fault for n, fault in known.items() if fault[0] in ops and n not in left_out}


def count(ops: Sequence[str], dtype: torch.dtype) -> int:
    """The number of checks that `check` makes."""
    return len(faults_of(ops, dtype)) + ("attention" in ops)


def check(
    ops: Sequence[str], dtype: torch.dtype, cases: Sequence[NamedCase], *, thorough: bool
) -> Iterator[Mutation]:
    """The unbroken kernel first, then each fault; `thorough` counts all cases that reject it."""
    if "attention" in ops:
        described = "attention", "the kernel that the others are made from, which must pass"
        yield _mutation(attention_mutants.Mutant(), described, dtype, cases, True)
    for name, fault in faults_of(ops, dtype).items():
        mutant = _MUTANTS.get(fault[0], row_mutants.RowMutant)(name)
        yield _mutation(mutant, fault, dtype, cases, thorough)


def _mutation(
    mutant: Implementation,
    fault: tuple[str, str],
    dtype: torch.dtype,
    cases: Sequence[NamedCase],
    thorough: bool,
) -> Mutation:
    op, description = fault
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
    is_control = mutant.name == CONTROL
    return Mutation(mutant.name, description, dtype, by, rejections, runs, is_control)
