"""`python -m rowmax.bench overhead` prints a line a call, and refuses what can't be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rowmax.bench.measure.overhead import calls


def test_a_line_for_each_call(shown: Any) -> None:
    lines = shown("overhead", "--seconds", "0.01").splitlines()
    for name in calls():
        (line,) = (line for line in lines if line.startswith(name + "  "))
        ours, theirs = (float(text) for text in line.split()[-2:])
        assert ours > 0
        assert theirs > 0


def test_both_columns_compute_the_same() -> None:
    for gradients, ours, theirs in calls().values():
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(), theirs())


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--seconds", "-1"], ["--backend", "none"]])
def test_what_can_not_be_meant(wrong: list[str], refused: Any) -> None:
    assert wrong[0] in refused("overhead", *wrong)
