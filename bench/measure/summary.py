"""The summary of a run: means by group, cells behind a peer, and the gain of masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .cases import IN_SHORT, PASSES, dtype_text
from .runner import Row
from .timing import geometric_mean

LEVEL = 0.95  # a ratio from here on is no slower than the peer
ALL = "all"
WITH_DROPOUT = "with dropout"
# Masks that reduce the work.
_WORK_REDUCING = ("causal", "padded", "window")


@dataclass(frozen=True)
class Mean:
    """A geometric mean of ratios, the least of them, and over how many cells."""

    ratio: float
    least: float
    cells: int

    def text(self) -> str:
        return f"{self.ratio:.2f} ({self.cells})"


class Group(NamedTuple):
    suite: str
    kind: str  # one of the suite's, or ALL, or WITH_DROPOUT
    dtype: torch.dtype | None  # None: whichever
    step: str | None  # None: whichever


class Slower(NamedTuple):
    """A cell where a peer is faster."""

    row: Row
    ratio: float

    def text(self) -> str:
        level = ", level" if self.row.level else ""
        return f"{self.row.case.text()}: {self.ratio:.2f} of {self.row.fastest_peer}{level}"


def _mean(ratios: Sequence[float]) -> Mean:
    return Mean(geometric_mean(ratios), min(ratios), len(ratios))


def group_means(rows: Iterable[Row]) -> dict[Group, Mean]:
    """Fastest peer / rowmax, over every group that has a line; ALL is the last of a suite's."""
    ratios: dict[Group, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            for group in _groups_of(row):
                ratios.setdefault(group, []).append(row.ratio)
    dropouts = {group.kind for group in ratios if "dropout" in group.kind.split("+")}
    return {
        group: _mean(some)
        for group, some in sorted(ratios.items(), key=lambda item: item[0].kind == ALL)
        if group.kind != WITH_DROPOUT or len(dropouts) > 1
    }


def _groups_of(row: Row) -> Iterator[Group]:
    case = row.case
    kinds = [case.kind, ALL]
    if "dropout" in case.parts:
        kinds.append(WITH_DROPOUT)
    for kind in kinds:
        for dtype in (case.dtype, None):
            for step in (case.step, None):
                yield Group(case.suite.name, kind, dtype, step)


def slower_than_a_peer(rows: Iterable[Row]) -> list[Slower]:
    """The worst first."""
    behind = [Slower(row, row.ratio) for row in rows if row.ratio is not None and row.ratio < LEVEL]
    return sorted(behind, key=lambda slower: slower.ratio)


class Gain(NamedTuple):
    """rowmax with a mask against rowmax without it: how much less time it takes."""

    suite: str
    kind: str
    unmasked: str  # the kind that it is compared with
    dtype: torch.dtype
    step: str


def gains_of_masks(rows: Iterable[Row]) -> dict[Gain, Mean]:
    """For each mask, over the shapes that were measured with and without it in this run."""
    rows = list(rows)
    times = {
        (row.case.suite.name, row.case.kind, row.case.dtype, row.case.shape, row.case.step): (
            row.timings["rowmax"].median
        )
        for row in rows
        if "rowmax" in row.timings
    }
    gains: dict[Gain, list[float]] = {}
    for suite, kind, dtype, shape, step in times:
        masks = [part for part in kind.split("+") if part in _WORK_REDUCING]
        if not masks:
            continue
        unmasked = "+".join(part for part in kind.split("+") if part not in masks) or "full"
        without = times.get((suite, unmasked, dtype, shape, step))
        if without is not None:
            ratio = without / times[suite, kind, dtype, shape, step]
            gains.setdefault(Gain(suite, kind, unmasked, dtype, step), []).append(ratio)
    return {gain: _mean(ratios) for gain, ratios in gains.items()}


def lines(rows: Iterable[Row]) -> list[str]:
    """All of it, for the end of the report."""
    rows = list(rows)
    means = group_means(rows)
    result = ["", "geometric means of the ratio, fastest peer / rowmax (above 1: rowmax is faster)"]
    if not means:
        return [*result, "  none: no line has both rowmax and a peer"]
    for suite in dict.fromkeys(group.suite for group in means):
        result += _table(suite, {key: mean for key, mean in means.items() if key.suite == suite})
    behind = slower_than_a_peer(rows)
    compared = sum(row.ratio is not None for row in rows)
    result += [
        "",
        f"slower than the fastest peer (below {LEVEL}): {len(behind)} of {compared} cells",
    ]
    result += [f"  {slower.text()}" for slower in behind]
    gains = gains_of_masks(rows)
    if gains:
        result += ["", "rowmax without the mask / with it, geometric mean and least over shapes"]
    for gain, mean in gains.items():
        what = f"{gain.kind} against {gain.unmasked}, {dtype_text(gain.dtype)}, {gain.step}"
        result.append(f"  {what:<56} {mean.ratio:6.2f}   least {mean.least:.2f} of {mean.cells}")
    return result


def _table(suite: str, means: dict[Group, Mean]) -> list[str]:
    """One line a kind, one column a dtype and pass; in brackets over how many cells."""
    dtypes = list(dict.fromkeys(group.dtype for group in means if group.dtype is not None))
    found = {(group.dtype, group.step) for group in means}
    columns: list[tuple[torch.dtype | None, str | None]] = [
        (dtype, step) for dtype in dtypes for step in PASSES if (dtype, step) in found
    ]
    names = [f"{dtype_text(dtype)} {IN_SHORT[step]}" for dtype, step in columns if dtype and step]
    columns.append((None, None))
    names.append(ALL)
    width = max(12, *(len(name) + 2 for name in names))
    result = [f"  {suite:<15}" + "".join(f"{name:>{width}}" for name in names)]
    for kind in dict.fromkeys(group.kind for group in means):
        cells = [means.get(Group(suite, kind, *column)) for column in columns]
        texts = ["-" if cell is None else cell.text() for cell in cells]
        result.append(f"  {kind:<15}" + "".join(f"{text:>{width}}" for text in texts))
    return result
