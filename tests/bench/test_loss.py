"""`python -m rowmax.bench loss` prints a line an implementation, and refuses what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rowmax.bench.measure.loss import calls


def test_prints_time_and_memory(tmp_path: Path, shown: Any) -> None:
    out = tmp_path / "loss.json"
    options = ["--shape", "64,16,500", "--seconds", "0.05", "--json", str(out)]
    printed = shown("loss", *options)
    found = json.loads(out.read_text())["found"]
    assert next(iter(found)) == "unfused"
    for name, figures in found.items():
        assert f"\n{name} " in printed
        assert figures["seconds"] > 0


def test_all_compute_the_same() -> None:
    every = {name: call() for name, call in calls((33, 16, 70), torch.float32, "cpu", 0.1).items()}
    for results in every.values():
        torch.testing.assert_close(results, every["unfused"])


@pytest.mark.parametrize(
    "wrong",
    [
        ("--shape", "1,2"),
        ("--shape", "1,2,0"),
        ("--shape", "a,b,c"),
        ("--smoothing", "2"),
        ("--seconds", "0"),
        ("--threads", "0"),
    ],
    ids=" ".join,
)
def test_refuses(wrong: tuple[str, str], refused: Any) -> None:
    assert wrong[0] in refused("loss", *wrong)
