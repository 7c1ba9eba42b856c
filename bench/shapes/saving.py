"""What a recorded step would save: each call's time by how often it came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..measure.cases import Case
from ..measure.runner import Row
from ..peers.candidates import ROWMAX
from .calls import Call

_TORCH = ("sdpa", "torch")  # what the recorded model calls now


def cases_of(
    calls: Mapping[Call, int], dtypes: Mapping[str, Any]
) -> tuple[Counter[Case], list[str]]:
    """The cases by how often each came, and why calls are left out, each reason with its count."""
    cases: Counter[Case] = Counter()
    reasons: Counter[str] = Counter()
    for call, count in calls.items():
        found = call.case(dtypes)
        if isinstance(found, Case):
            cases[found] += count
        else:
            reasons[found] += count
    return cases, [f"{count} calls are left out: {reason}" for reason, count in reasons.items()]


def lines(rows: Iterable[Row], counts: Mapping[Case, int]) -> list[str]:
    """The calls of the step on torch's path and on rowmax, over those that both were timed at."""
    now = then = 0.0
    calls = 0
    for row in rows:
        names = [name for name in _TORCH if name in row.timings]
        count = counts.get(row.case, 0)
        if names and ROWMAX in row.timings:
            calls += count
            now += count * row.timings[names[0]].median
            then += count * row.timings[ROWMAX].median
    if not calls:
        return ["recorded calls: none was timed both on torch's path and on rowmax"]
    saved, share = now - then, 100 * (1 - then / now)
    missing = sum(counts.values()) - calls
    left = f"; {missing} others were not timed on both" if missing else ""
    times = f"{1e3 * now:.4g} ms on torch's path, {1e3 * then:.4g} ms on {ROWMAX}"
    return [f"the {calls} recorded calls: {times}: {1e3 * saved:.4g} ms saved, {share:.0f}%{left}"]
