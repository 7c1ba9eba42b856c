"""`python -m rowmax.bench training` prints a line an implementation, and refuses what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rowmax.bench.measure import figures, training
from rowmax.transformer.config import ModelConfig


def test_prints_tokens_a_second(tmp_path: Path, shown: Any, tiny: ModelConfig) -> None:
    out = tmp_path / "training.json"
    options = ["--size", "small", "--pairs", "3", "--seconds", "0.1", "--json", str(out)]
    printed = shown("training", "--bfloat16", *options)
    found = json.loads(out.read_text())
    names = ["packed", "padded", "nn.Transformer", "packed, bfloat16", "nn.Transformer, bfloat16"]
    assert list(found["found"]) == names
    for name in found["found"]:
        assert f"\n{name:24} " in printed
    assert found["tokens"] < found["places"]


def test_beside_busy_processes(tmp_path: Path, shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "training.json"
    options = ["--size", "small", "--pairs", "3", "--seconds", "0.1", "--json", str(out)]
    assert "ms, 2 busy  slower" in shown("training", "--busy", "2", *options)
    found = json.loads(out.read_text())["found"]
    assert all(each["seconds_while_busy"] > 0 for each in found.values())


def test_the_busy_processes_end() -> None:
    children = psutil.Process().children
    before = set(children())
    with figures.busy(2):
        started = set(children()) - before
        assert len(started) == 2
    assert not any(child.is_running() for child in started)


def test_the_same_batch_packed_and_padded() -> None:
    for equal in (True, False):
        padded, packed = training.batches(50, 5, equal=equal)
        assert padded.tokens == packed.tokens
        full = padded.source.numel() + padded.target_out.numel()
        assert (padded.tokens == full) == equal


def test_torchs_transformer_learns_the_same_kind_of_loss(tiny: ModelConfig) -> None:
    padded, packed = training.batches(50, 5, equal=False)
    steps = training.steps(tiny, padded, packed, "reference")
    losses = {name: step() for name, step in steps.items()}
    assert losses["packed"] == pytest.approx(losses["padded"], rel=0.1)  # dropout differs
    assert losses["nn.Transformer"] == pytest.approx(losses["padded"], rel=0.5)
    model = training.TorchTransformer(tiny).eval()
    one = training.batches(50, 1, equal=False)[0]
    longer = torch.nn.functional.pad(one.source, (0, 7), value=3)
    changed = type(one)(
        *(longer, one.source_lengths, one.target_in, one.target_out, one.target_lengths)
    )
    torch.testing.assert_close(model.loss(changed, 0.1), model.loss(one, 0.1))


@pytest.mark.parametrize(
    "wrong", [("--pairs", "0"), ("--seconds", "0"), ("--busy", "0")], ids=" ".join
)
def test_what_is_wrong(wrong: tuple[str, str], refused: Any) -> None:
    assert wrong[0] in refused("training", *wrong)
