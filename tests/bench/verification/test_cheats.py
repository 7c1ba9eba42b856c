"""Cheating candidates: `verify` and `speed` reject each, and accept honest ones."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from rowmax.bench import speed, verify
from rowmax.bench.machine.host import CpuLimits
from rowmax.bench.verification.cheats import CHEATS

SHAPE = (3, 4, 40, 16)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = CpuLimits(1, 1e15, 1e15)
    monkeypatch.setattr("rowmax.bench.measure.measurement.measure_limits", lambda: limits)


def by_verify(function: Any, **chosen: Any) -> list[str]:
    found: dict[str, Any] = {"dtypes": ["float32"], "checks": ["invariants"], **chosen}
    return verify(function, **found).failures


def by_speed(function: Any, **chosen: Any) -> str | None:
    few: dict[str, Any] = {"kinds": ["full"], "peers": ["sdpa"], "seconds": 0.05}
    rows = speed(
        function, shapes=[SHAPE], backend="reference", **{"backward": False, **few, **chosen}
    ).rows
    return next((row.faults["yours"] for row in rows if "yours" in row.faults), None)


@pytest.mark.parametrize("name", CHEATS)
@pytest.mark.parametrize("judge", ["verify", "speed"])
def test_a_cheat_is_rejected(name: str, judge: str) -> None:
    cheat = CHEATS[name]
    if judge not in cheat.seen_by:
        assert cheat.reason
        return
    with ExitStack() as stack:
        candidate = cheat.make(stack)
        if judge == "verify":
            assert by_verify(candidate)
        else:
            assert by_speed(candidate, backward="gradients" in name) is not None
