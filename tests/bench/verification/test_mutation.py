"""Kernels broken on purpose: each is rejected, and a tolerance that lets one live fails."""

from __future__ import annotations

import pytest
import torch

from rowmax.bench import verify
from rowmax.bench.verification import mutation, suite
from rowmax.bench.verification.attention_mutants import FAULTS as ATTENTION_FAULTS
from rowmax.bench.verification.cross_entropy_mutants import FAULTS as LOSS_FAULTS
from rowmax.bench.verification.row_mutants import FAULTS as ROW_FAULTS
from rowmax.kernels.testing import tolerance
from rowmax.kernels.testing.suite import OPS

# The faults that the check was made for, by their names.
ASKED_FOR = (
    *("mask-off-by-one", "no-rescale", "scale-after-mask", "dropout-unscaled", "dk-dv-swapped"),
    *("statistics-in-half", "last-tile-skipped"),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mutant_is_rejected_and_the_unbroken_kernel_is_not(dtype: str) -> None:
    settings = suite.Settings(quick=True)
    cases = suite.cases_of(settings, suite.DTYPES[dtype])
    found = list(mutation.check(OPS, suite.DTYPES[dtype], cases, thorough=False))
    assert len(found) == mutation.count(OPS, suite.DTYPES[dtype])
    control, *broken = found
    assert control.control
    assert control.rejected_by is None
    assert control.cases > 80
    assert [one.fault for one in broken if one.rejected_by is None] == []
    assert {one.fault for one in broken} >= set(ASKED_FOR)


def test_float64_has_every_fault() -> None:
    every = {*ATTENTION_FAULTS, *ROW_FAULTS, *LOSS_FAULTS}
    assert set(mutation.faults_of(OPS, torch.float64)) == every


def test_a_tolerance_that_lets_one_live_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance, "FACTOR", 1e8)
    report = verify(
        backends=["reference"], ops=["rms_norm"], dtypes=["float32"], checks=["mutations"]
    )
    assert not report.passed
    assert any("rms-statistics-in-half" in failure for failure in report.failures)
    assert "NOT NOTICED: " in str(report)
    assert "LIVES" in str(report)


def test_a_control_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing passes, rejecting the mutants says nothing."""
    monkeypatch.setattr(tolerance, "FACTOR", 0.0)
    monkeypatch.setattr(tolerance, "SUMMATION", 0.0)
    settings = suite.Settings(ops=("attention",), quick=True, kinds=("none",))
    cases = suite.cases_of(settings, torch.float32)
    control = next(mutation.check(("attention",), torch.float32, cases, thorough=False))
    assert control.rejected_by is not None
    assert not control.passed
