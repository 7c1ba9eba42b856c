"""Work in a process of its own: what comes of it, and of one that ends early, or never."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rowmax.bench.machine import gpu
from rowmax.bench.measure import runner
from rowmax.bench.measure.cases import FORWARD, SUITES, Case, cases_of
from rowmax.bench.measure.isolated import LostError, results
from rowmax.bench.measure.timing import Budget
from rowmax.bench.peers.candidates import ROWMAX

# Functions of Python's own, which every process can import.
COMES_TO_ITS_END = "(n for n in range(5))"
DIES = "(n if n < 1 else __import__('os')._exit(7) for n in range(3))"
RAISES = "(n if n < 1 else int('no number') for n in range(3))"
FOREMOST = "__import__('warnings').filters[0]"
NEVER_ENDS = "(n if n < 1 else __import__('time').sleep(60) for n in range(3))"


def test_results_come_one_by_one() -> None:
    assert list(results(eval, COMES_TO_ITS_END, seconds=60)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "message,hidden",
    [
        ("Attempting to run cuBLAS, but there was no current CUDA context! Attempting to", True),
        ("Attempting something else", False),
    ],
)
def test_a_warning_that_means_nothing_is_hidden(message: str, hidden: bool) -> None:
    """torch's, of a thread that has no CUDA context yet."""
    text = f"[{FOREMOST}[0] == 'ignore' and {FOREMOST}[1].match({message!r}) is not None]"
    assert list(results(eval, text, seconds=60)) == [hidden]


@pytest.mark.parametrize(
    "text,reason,seconds",
    [
        (DIES, "^its process ended with status 7$", 60),
        (RAISES, "^ValueError: invalid literal.*'no number'$", 60),
        (NEVER_ENDS, "^not done after 1 seconds$", 1),
    ],
    ids=["dies", "raises", "never-ends"],
)
def test_what_does_not_end_well(text: str, reason: str, seconds: float) -> None:
    """Earlier results are there, and later work goes on."""
    assert list(results(eval, "[7]", seconds=60)) == [7]  # what others are forked from is there now
    coming = results(eval, text, seconds=seconds)
    assert next(coming) == 0
    with pytest.raises(LostError, match=reason):
        next(coming)
    assert len(list(results(eval, COMES_TO_ITS_END, seconds=60))) == 5


def test_rows_that_are_lost_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case has its row, and the run has failed."""
    suite = SUITES["cpu-norms"]
    cases: list[Case] = cases_of(suite, suite.dtypes, ["layer_norm"], suite.steps, [(4, 8)])
    measured = (
        cases,
        ["torch"],
        "auto",
        Budget(0.0, 1, 1),
        gpu.GpuLimits(suite.dtypes[0], 1e18, 1e18),
    )
    rows = list(runner.isolated_rows(*measured, seconds=60))
    assert [row.case for row in rows] == cases
    assert not any(row.failed for row in rows)
    assert all(set(row.timings) == {ROWMAX, "torch"} for row in rows)

    def one_row(*_: object, seconds: float) -> Iterator[runner.Row]:
        yield rows[0]
        raise LostError("its process ended with status -9")

    monkeypatch.setattr(runner, "results", one_row)
    first, second = runner.isolated_rows(*measured, seconds=60)
    assert first.case.step == FORWARD
    assert not first.failed
    assert second.failed
    assert second.case == cases[1]
    assert second.faults == {ROWMAX: "its process ended with status -9"}
    assert second.as_json()["seconds"] == {}
