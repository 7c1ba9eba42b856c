"""`chart`: the ratios that are drawn, and what has nothing to draw."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rowmax.bench.cli import main
from rowmax.bench.render.ratio_chart import ratios_of

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def row(kind: str, step: str, **medians: float) -> dict[str, Any]:
    seconds = {name: {"median": median} for name, median in medians.items()}
    return {"kind": kind, "pass": step, "seconds": seconds}


def test_a_bar_is_the_geometric_mean_over_shapes() -> None:
    rows = [
        row("plain", "forward", rowmax=1.0, sdpa=2.0, naive=9.0),  # the former name of "full"
        row("full", "forward", rowmax=1.0, sdpa=8.0, naive=3.0),
        row("causal", "forward", rowmax=2.0, naive=1.0),
        row("causal", "backward", sdpa=1.0),  # rowmax has no time: no bar
    ]
    found = ratios_of(rows, ["sdpa", "fastest"])
    assert found.keys() == {("full", "forward"), ("causal", "forward")}
    assert found["full", "forward"] == pytest.approx([4.0, math.sqrt(6.0)])
    assert math.isnan(found["causal", "forward"][0])
    assert found["causal", "forward"][1] == pytest.approx(0.5)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_results_are_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / f"chart{suffix}"
    file = next(RESULTS.glob("gpu-speed-*.json"))
    assert main(["chart", str(file), "--peers", "sdpa-flash", "--output", str(output)]) == 0
    assert output.stat().st_size > 1000


def test_what_cannot_be_drawn(tmp_path: Path, refused: Any) -> None:
    """A sentence and exit status 2."""
    empty, other = tmp_path / "empty.json", tmp_path / "other.json"
    machine = {"machine": {"cpu": "a"}, "noise": {"complaints": []}}
    empty.write_text(json.dumps({"rows": []} | machine))
    other.write_text("{")
    for file, output, words in (
        (empty, "a.svg", "no timing of rowmax"),
        (other, "a.svg", "no result of `speed --json`"),
        (empty, "a.pdf", "--output: expected"),
    ):
        assert words in refused("chart", str(file), "--output", str(tmp_path / output))
