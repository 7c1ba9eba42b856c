"""The summary of lines: means by group, cells behind a peer, gains by masks, and the text."""

from __future__ import annotations

import json
from dataclasses import astuple

import pytest
import torch

from rowmax.bench.measure import report, summary
from rowmax.bench.measure.cases import FORWARD, FORWARD_BACKWARD, SUITES, Case
from rowmax.bench.measure.runner import Row
from rowmax.bench.measure.timing import Timing

ATTENTION, NORMS = SUITES["cpu-attention"], SUITES["cpu-norms"]
SHORT, LONG = (1, 8, 128, 64), (1, 8, 512, 64)


def row(
    kind: str,
    rowmax: float | None,
    peer: float | None = None,
    *,
    shape: tuple[int, ...] = SHORT,
    step: str = FORWARD,
    dtype: torch.dtype = torch.float32,
) -> Row:
    """A line on which one peer took `peer` seconds; the slower one is never the fastest."""
    times = {"rowmax": rowmax, "sdpa": peer, "naive": None if peer is None else 2 * peer}
    timings = {name: Timing(t, t, t, 5, (t, t), 0) for name, t in times.items() if t is not None}
    suite = NORMS if len(shape) == 2 else ATTENTION
    case = Case(suite, dtype, kind, shape, step)
    return Row(case, timings, {}, {}, False, dict.fromkeys(timings, 1.0), None, None, None)


def group(kind: str, dtype: torch.dtype | None = None, step: str | None = None) -> summary.Group:
    return summary.Group("cpu-attention", kind, dtype, step)


def test_means_of_groups() -> None:
    rows = [
        row("full", 1.0, 2.0),
        row("full", 1.0, 8.0, shape=LONG),
        row("full", 1.0, 4.0, step=FORWARD_BACKWARD),
        row("dropout", 1.0, 3.0),
        row("causal+dropout", 1.0, 27.0, dtype=torch.bfloat16),
        row("padded", None, 5.0),
        row("layer_norm", 1.0, 7.0, shape=(8, 8)),
    ]
    means = summary.group_means(rows)
    assert astuple(means[group("full", torch.float32, FORWARD)]) == (pytest.approx(4.0), 2.0, 2)
    assert means[group("full")].cells == 3
    assert astuple(means[group(summary.WITH_DROPOUT)]) == (pytest.approx(9.0), 3.0, 2)
    assert means[group(summary.ALL, torch.bfloat16)].ratio == pytest.approx(27.0)
    assert means[group(summary.ALL)].cells == 5
    assert means[summary.Group("cpu-norms", summary.ALL, None, None)].ratio == pytest.approx(7.0)
    assert group("padded") not in means
    one_dropout = summary.group_means(rows[:4])
    assert group(summary.WITH_DROPOUT) not in one_dropout  # it would say the same twice


def test_cells_behind_a_peer() -> None:
    """0.95 is level; the worst comes first, and says who is faster."""
    rows = [row("full", 1.0, 0.9), row("causal", 1.0, 0.5), row("padded", 1.0, 0.95)]
    behind = summary.slower_than_a_peer([*rows, row("bias", None, 1.0)])
    assert [slower.text() for slower in behind] == [
        "causal (1,8,128,64) forward float32: 0.50 of sdpa",
        "full (1,8,128,64) forward float32: 0.90 of sdpa",
    ]


def test_gains_of_masks() -> None:
    """Against the same shape, pass and dtype without the mask, dropout kept."""
    rows = [
        row("full", 6.0),
        row("full", 9.0, shape=LONG),
        row("padded", 3.0),
        row("padded", 1.0, shape=LONG),
        row("window", 0.5),
        row("dropout", 8.0),
        row("padded+dropout", 4.0),
        row("causal", 1.0, step=FORWARD_BACKWARD),  # nothing to compare it with
        row("causal", 1.0, dtype=torch.bfloat16),
    ]
    gains = {
        (gain.kind, gain.unmasked): mean for gain, mean in summary.gains_of_masks(rows).items()
    }
    assert gains.keys() == {("padded", "full"), ("window", "full"), ("padded+dropout", "dropout")}
    assert astuple(gains["padded", "full"]) == (pytest.approx((2.0 * 9.0) ** 0.5), 2.0, 2)
    assert gains["window", "full"].ratio == 12.0
    assert gains["padded+dropout", "dropout"].ratio == 2.0


def test_the_text_fits_and_says_it_all() -> None:
    rows = [
        row(kind, 2.0 if kind == "bias" else 1.0, 1.5, step=step, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for kind in ATTENTION.kinds[:7]
        for step in (FORWARD, FORWARD_BACKWARD)
    ]
    text = report.summary_lines(rows)
    assert max(map(len, text)) <= report.WIDTH
    (means,) = (line for line in text if line.startswith("  with dropout"))
    assert means.split() == ["with", "dropout", *["1.50", "(3)"] * 4, "1.50", "(12)"]
    assert "slower than the fastest peer (below 0.95): 4 of 28 cells" in text
    assert "  bias (1,8,128,64) forward bfloat16: 0.75 of sdpa" in text
    assert any(line.split()[:3] == ["padded", "against", "full,"] for line in text)
    document = json.loads(
        json.dumps(report.document(rows, {}, {}, settings={}, load_at_end=None, noise={}))
    )
    assert len(document["slower_than_a_peer"]) == 4
    assert {entry["kind"] for entry in document["gains_of_masks"]} == {
        *("causal", "padded", "causal+dropout", "padded+dropout")
    }


def test_nothing_to_compare() -> None:
    assert "  none: no line has both rowmax and a peer" in report.summary_lines([row("full", 1.0)])


def test_each_reason_is_told_once() -> None:
    printed: set[str] = set()
    first, second = row("full", 1.0, 2.0), row("causal", 1.0, 2.0)
    for some in (first, second):
        some.not_done["openvino"] = "it can't"
    second.faults["compile"] = "CppCompileError: " + "long " * 200
    peers = ("sdpa", "compile", "openvino")
    assert report.row_lines(first, peers, printed)[1:] == ["  openvino not done: it can't"]
    line, *reasons = report.row_lines(second, peers, printed)
    assert line.split()[-6:] == ["2000", "fault", "-", "2.00", "-", "-"]
    assert len(reasons) == 4  # cut off
    assert reasons[0].startswith("  compile not timed: CppCompileError: long long")
    assert max(map(len, reasons)) <= report.WIDTH


@pytest.mark.parametrize(
    "seconds, text",
    [(1.2345e-6, "0.0012"), (1.2345e-3, "1.234"), (0.1103, "110.3"), (12.3456, "12346")],
)
def test_times_have_four_digits(seconds: float, text: str) -> None:
    (line,) = report.row_lines(row("full", seconds), (), set())
    assert line.split()[2] == text
