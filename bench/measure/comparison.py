"""`python -m rowmax.bench compare A.json B.json`: the changes between two runs.

Exit status 1 where a case became slower by more than the threshold and the 95 % intervals of both
runs do not overlap, or where a case is in one of the runs alone; 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import UsageError, listed, renamed
from ..peers.candidates import ROWMAX
from ..render import markdown
from .cases import IN_SHORT
from .intervals import Interval, overlap, ratio_interval
from .report import SCHEMA
from .timing import geometric_mean

THRESHOLD = 0.05
BY = ("time", "ratio")

Key = tuple[str, str, str, tuple[int, ...], str]


@dataclass(frozen=True)
class Timed:
    """The median of a candidate's times in seconds, and its 95 % interval."""

    median: float
    interval: Interval


@dataclass(frozen=True)
class Measured:
    """One case of a run: the time of each candidate, or why it has none."""

    key: Key
    seconds: Mapping[str, Timed]
    faults: Mapping[str, str]
    fastest_peer: str | None


@dataclass(frozen=True)
class Run:
    """A file of results, completely parsed and checked."""

    source: str
    machine: Mapping[str, str]  # the fields that times depend on
    memory: str
    layout: str  # of attention's tensors
    complaints: Sequence[str]
    cases: Sequence[Measured]


@dataclass(frozen=True)
class Change:
    """One case in both runs: its time, or its time over the fastest peer's."""

    key: Key
    before: float
    after: float
    before_interval: Interval
    after_interval: Interval

    @property
    def factor(self) -> float:
        """Below 1 it became faster, above 1 slower."""
        return self.after / self.before

    @property
    def significant(self) -> bool:
        return not overlap(self.before_interval, self.after_interval)

    def verdict(self, threshold: float) -> str:
        if not self.significant:
            return "level"
        if self.factor > 1 + threshold:
            return "SLOWER"
        if self.factor < 1 / (1 + threshold):
            return "faster"
        return "within the threshold"


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("before", type=Path, metavar="A.json")
    command.add_argument("after", type=Path, metavar="B.json")
    command.add_argument(
        "--threshold",
        type=float,
        default=100 * THRESHOLD,
        metavar="PERCENT",
        help="slower by more than this is a regression; default: %(default)g",
    )
    command.add_argument(
        "--by",
        choices=BY,
        default="time",
        help="time itself, or time over the fastest peer's in the same run, which another machine "
        "or a busier one changes less; default: %(default)s",
    )
    command.add_argument("--candidate", default=ROWMAX, help="default: %(default)s")
    markdown.add_markdown_options(command)


def run(options: argparse.Namespace) -> int:
    if not options.threshold >= 0 or math.isinf(options.threshold):
        raise UsageError(f"--threshold: expected a number >= 0, got {options.threshold}")
    markdown.check_markdown(options)
    threshold = options.threshold / 100
    before, after = (load(path) for path in (options.before, options.after))
    if options.by == "ratio" and options.candidate != ROWMAX:
        raise UsageError(f"--candidate: --by ratio is {ROWMAX}'s, got {options.candidate}")
    changes = changes_between(before, after, options.candidate, options.by)
    unmatched = unmatched_lines(before, after, options.candidate, options.by)
    if not changes and not unmatched:
        raise UsageError(f"neither file has a case of {options.candidate}")
    print("\n".join([*lines(before, after, changes, threshold, options.by), *unmatched]))
    factor = 1e3 if options.by == "time" else 1.0
    table = [
        (_case(c.key), factor * c.before, factor * c.after, c.verdict(threshold)) for c in changes
    ]
    markdown.write_markdown(options, markdown.of_compare(table, unmatched, threshold))
    return 1 if unmatched or any(one.verdict(threshold) == "SLOWER" for one in changes) else 0


def load(path: Path) -> Run:
    """A JSON that `speed --json` wrote. Raises UsageError for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"{path}: expected results of `speed --json` with schema {SCHEMA}, "
            f"got schema {schema!a}"
        )
    try:
        return _parsed(document)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _parsed(document: Mapping[str, Any]) -> Run:
    machine, packages = document["machine"], document["machine"]["packages"]
    source = (
        f"{document['settings']['started']}, {machine['cpu']}, {machine['torch_threads']} threads, "
        f"rowmax {packages['rowmax']}, torch {packages['torch']}"
    )
    return Run(
        _text(source),
        {name: _text(machine.get(name)) for name in ("cpu", "torch_threads", "instruction_set")},
        _text(document["settings"].get("memory", "fresh")),
        _text(document["settings"].get("layout", "bhld")),
        [_text(complaint) for complaint in document["noise"]["complaints"]],
        [_measured(row) for row in document["rows"]],
    )


def _measured(row: Mapping[str, Any]) -> Measured:
    names = (_text(row["suite"]), _text(row["dtype"]), renamed("--kind", _text(row["kind"])))
    key = (*names, tuple(int(size) for size in row["shape"]), _text(row["pass"]))
    peer = row["fastest_peer"]
    if peer is not None and peer not in row["seconds"]:
        raise ValueError(f"{_case(key)}: fastest peer {peer!a}")
    seconds = {name: _timed(timing, key) for name, timing in row["seconds"].items()}
    faults = {_text(name): _text(fault) for name, fault in row["faults"].items()}
    return Measured(key, seconds, faults, peer)


def _timed(timing: Mapping[str, Any], key: Key) -> Timed:
    median, low, high = map(float, (timing["median"], *timing["interval"]))
    if not (0 < low <= median <= high < math.inf):
        raise ValueError(f"{_case(key)}: a median of {median} in [{low}, {high}]")
    return Timed(median, (low, high))


def _text(value: object) -> str:
    """As text that any stream can print: JSON may hold halves of characters."""
    text = str(value)
    text.encode()
    return text


def _case(key: Key) -> str:
    suite, dtype, kind, shape, step = key
    return f"{suite} {dtype} {kind} ({','.join(map(str, shape))}) {IN_SHORT.get(step, step)}"


def unmatched_lines(before: Run, after: Run, candidate: str, by: str) -> list[str]:
    """The cases that only one of the runs has, and why the candidate failed in the other."""
    found: list[str] = []
    for name, these, other, others in (("A", before, "B", after), ("B", after, "A", before)):
        missing = _measures(others, candidate, by)
        faults = {case.key: case.faults.get(candidate) for case in others.cases}
        for key in _measures(these, candidate, by):
            if key not in missing:
                why = f", where {candidate} failed: {faults[key]}" if faults.get(key) else ""
                found.append(f"only in {name}, not in {other}: {_case(key)}{why}")
    return found


def changes_between(before: Run, after: Run, candidate: str, by: str) -> list[Change]:
    """For the cases that both have, in the order of the second."""
    old, new = (_measures(one, candidate, by) for one in (before, after))
    return [
        Change(key, old[key].median, value.median, old[key].interval, value.interval)
        for key, value in new.items()
        if key in old
    ]


def _measures(one: Run, candidate: str, by: str) -> dict[Key, Timed]:
    found: dict[Key, Timed] = {}
    for case in one.cases:
        value = case.seconds.get(candidate)
        if value is None:
            continue
        if by == "ratio":
            if case.fastest_peer is None:
                continue
            peer = case.seconds[case.fastest_peer]
            value = Timed(value.median / peer.median, ratio_interval(value.interval, peer.interval))
        found[case.key] = value
    return found


def lines(
    before: Run, after: Run, changes: Sequence[Change], threshold: float, by: str
) -> list[str]:
    found = [f"A: {before.source}", f"B: {after.source}"]
    differing = [name for name in before.machine if before.machine[name] != after.machine[name]]
    if differing and by == "time":
        found.append(f"other machines ({listed(differing)}): --by ratio compares what is in common")
    if before.memory != after.memory:
        memory = f"A has {before.memory} memory for results, B {after.memory}"
        found.append(f"other conditions: {memory}")
    if before.layout != after.layout:
        found.append(f"other conditions: A has tensors in {before.layout}, B in {after.layout}")
    for name, one in (("A", before), ("B", after)):
        found += [f"{name} was noisy: {complaint}" for complaint in one.complaints]
    if not changes:
        return [*found, "", "no case in common"]
    unit = "ms" if by == "time" else "of the fastest peer's time"
    factor = 1e3 if by == "time" else 1.0
    found += ["", f" {'case, ' + unit:<55}{'A':>9}{'B':>9}{'B/A':>7}  verdict"]
    for change in changes:
        found.append(
            f" {_case(change.key)[:54]:<55}{factor * change.before:>9.4g}"
            f"{factor * change.after:>9.4g}{change.factor:>7.2f}  {change.verdict(threshold)}"
        )
    verdicts = [change.verdict(threshold) for change in changes]
    mean = geometric_mean(change.factor for change in changes)
    counts = f"{verdicts.count('SLOWER')} slower, {verdicts.count('faster')} faster"
    means = f"{len(changes)} cases, geometric mean of B/A {mean:.3f}"
    found += ["", f"{means}: {counts} by more than {100 * threshold:g}%, the rest level or within"]
    return found
