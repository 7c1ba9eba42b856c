"""`python -m rowmax.bench smoke`: a line a feature, passed, failed or crashed.."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import pytest

from rowmax.bench.measure import isolated
from rowmax.bench.measure.isolated import LostError
from rowmax.bench.tuning import smoke
from rowmax.bench.verification.suite import DTYPES, Settings, cases_of
from rowmax.kernels.backends import gpu_triton


@pytest.mark.skipif(not gpu_triton.interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name,lines", [("sinks", 1), ("masked softmax", 5)])
def test_a_feature_is_held_to_float64(name: str, lines: int) -> None:
    found = list(smoke.check(name, "bfloat16"))
    assert len(found) == lines
    for passed, line in found:
        assert passed
        assert line.endswith(" ok")


def test_operations_run_side_by_side() -> None:
    """None of those that are many short cases shares a process with another one."""
    assert all(len(feature.ops) == 1 for feature in smoke.FEATURES.values())


def test_every_feature_has_cases() -> None:
    for feature in smoke.FEATURES.values():
        shapes = () if feature.sizes is None else (feature.sizes,)
        settings = Settings(feature.ops, feature.kinds, shapes=shapes, quick=True)
        cases = list(cases_of(settings, DTYPES["float32"]))
        assert {case.op for case in cases} == set(feature.ops)
        assert {case.kind for case in cases} == set(feature.kinds)


@pytest.mark.parametrize("verdict", ["right", "wrong", "lost"])
def test_what_is_said_of_a_feature(verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(*_: object, seconds: float) -> Iterator[tuple[bool, str]]:
        assert 50 < seconds < 61
        yield True, "the first case"
        if verdict == "lost":
            raise LostError("its process ended with status -11")
        yield verdict == "right", "the second case"

    monkeypatch.setattr(isolated, "results", results)
    passed, lines = smoke._lines("bias", "float32", perf_counter() + 60)
    assert passed == (verdict == "right")
    assert lines[0].endswith(" the first case")
    last = "bias float32: its process ended with status -11"
    assert lines[1].endswith(last if verdict == "lost" else " the second case")


def test_no_time_is_left() -> None:
    passed, (line,) = smoke._lines("bias", "float32", perf_counter())
    assert not passed
    assert line == "bias float32: not begun, no time was left"


@pytest.mark.parametrize(
    "wrong,message",
    [
        (["--feature", "bia"], "--feature: expected names of everything, "),
        (["--dtype", "float64"], "--dtype: expected names of bfloat16, float32"),
        (["--seconds", "0"], "--seconds: expected a positive number"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
    ],
)
def test_what_can_not_be_meant(wrong: list[str], message: str, refused: Any) -> None:
    assert message in refused("smoke", *wrong)
