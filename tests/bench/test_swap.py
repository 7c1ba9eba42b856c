"""`python -m rowmax.bench swap`: the table, the JSON, and wrong calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rowmax.bench.measure import swap as bench


def small() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def arguments(length: int, lengths: Tensor) -> dict[str, Tensor]:
    padding = torch.arange(length) >= lengths.unsqueeze(1)
    return {"src": torch.randn(len(lengths), length, 16), "src_key_padding_mask": padding}


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"encoder": bench.Model(small, arguments, ((4, 8), (2, 6)))}
    monkeypatch.setattr(bench, "MODELS", one)


def test_a_line_for_each_shape_and_step(shown: Any, tmp_path: Path) -> None:
    file = tmp_path / "swap.json"
    output = shown("swap", "--model", "encoder", "--seconds", "0.01", "--json", str(file))
    lines = [line for line in output.splitlines() if line[1:8] == "encoder"]
    assert len(lines) == 4
    rows = json.loads(file.read_text())["rows"]
    assert [(row["batch"], row["length"], row["step"]) for row in rows] == [
        *((4, 8, "inference"), (4, 8, "training")),
        *((2, 6, "inference"), (2, 6, "training")),
    ]
    for row in rows:
        assert min(row["original"], row["swapped"], row["packed"]) > 0
        assert 0 < row["share"] < 1
    assert rows[0]["real"] == (2 + 4 + 6 + 8) / 32


def test_what_is_not_right_is_not_timed(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        passed = False
        verdict = "FAIL: on purpose"

    monkeypatch.setattr(bench, "compare", lambda *_, **__: Wrong())
    out = shown("swap", "--model", "encoder", "--quick", status=1)
    assert "encoder (4, 8) is not timed: FAIL: on purpose" in out
    assert "training" not in out


@pytest.mark.parametrize(
    "words", [["--model", "gpt"], ["--seconds", "-1"], ["--threads", "0"]], ids=" ".join
)
def test_wrong_calls(words: list[str], refused: Any) -> None:
    assert words[0] in refused("swap", *words)
