"""`python -m rowmax.bench compare A.json B.json`: what became faster or slower, and how surely.

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

from .intervals import Interval, overlap, ratio_interval
from .options import UsageError, listed
from .peers import SUBJECT
from .report import SCHEMA
from .timing import geometric_mean

THRESHOLD = 0.05
BY = ("time", "ratio")
_STEPS = {"forward": "fwd", "forward+backward": "f+b", "backward": "bwd"}

Key = tuple[str, str, str, tuple[int, ...], str]


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


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="two saved results of `speed`: what became faster or slower, and how surely",
        description=(
            "Compares the JSON files of two runs, case by case. Exit status 1 where one became "
            "slower by more than the threshold and the 95%% intervals do not overlap, or where one "
            "is in one of the files alone."
        ),
        epilog="example: python -m rowmax.bench compare before.json after.json --threshold 10",
    )
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
    command.add_argument("--candidate", default=SUBJECT, help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    if not options.threshold >= 0 or math.isinf(options.threshold):
        raise UsageError(f"--threshold: expected a number >= 0, got {options.threshold}")
    threshold = options.threshold / 100
    before, after = (load(path) for path in (options.before, options.after))
    if options.by == "ratio" and options.candidate != SUBJECT:
        raise UsageError(f"--candidate: --by ratio is {SUBJECT}'s, got {options.candidate}")
    changes = changes_between(before, after, options.candidate, options.by)
    if not changes:
        raise UsageError(f"the two files have no case of {options.candidate} in common")
    print("\n".join(lines(before, after, changes, threshold, options.by)))
    alone = alone_lines(before, after, options.candidate, options.by)
    print("\n".join(alone), end="\n" if alone else "")
    return 1 if alone or any(one.verdict(threshold) == "SLOWER" for one in changes) else 0


def load(path: Path) -> dict[str, Any]:
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
            f"got schema {schema!r}"
        )
    try:
        _check(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return dict(document)


def _check(document: Mapping[str, Any]) -> None:
    """Reads all that is read of a document; any error says that it is none of `speed --json`."""
    _source(document), _memory(document), list(document["noise"]["complaints"])
    for row in document["rows"]:
        _key(row), dict(row["faults"])
        for timing in row["seconds"].values():
            numbers = (timing["median"], *timing["interval"])
            if len(numbers) != 3 or not all(0 < number < math.inf for number in numbers):
                raise ValueError(f"{_case(_key(row))}: times of {numbers}")
        if row["fastest_peer"] is not None and not isinstance(row["fastest_peer"], str):
            raise ValueError(f"{_case(_key(row))}: fastest peer {row['fastest_peer']!r}")


def _key(row: Mapping[str, Any]) -> Key:
    names = (str(row["suite"]), str(row["dtype"]), str(row["kind"]))
    return (*names, tuple(int(size) for size in row["shape"]), str(row["pass"]))


def _case(key: Key) -> str:
    suite, dtype, kind, shape, step = key
    return f"{suite} {dtype} {kind} ({','.join(map(str, shape))}) {_STEPS.get(step, step)}"


def alone_lines(
    before: Mapping[str, Any], after: Mapping[str, Any], candidate: str, by: str
) -> list[str]:
    """The cases that one of the runs has and the other has not, with what it says of them."""
    found: list[str] = []
    for name, document, other, others in (("A", before, "B", after), ("B", after, "A", before)):
        missing = _measures(others, candidate, by)
        said = {_key(row): row["faults"].get(candidate) for row in others["rows"]}
        for key in _measures(document, candidate, by):
            if key not in missing:
                why = f", where {candidate} failed: {said[key]}" if said.get(key) else ""
                found.append(f"only in {name}, not in {other}: {_case(key)}{why}")
    return found


def changes_between(
    before: Mapping[str, Any], after: Mapping[str, Any], candidate: str, by: str
) -> list[Change]:
    """For the cases that both have, in the order of the second."""
    old, new = (_measures(document, candidate, by) for document in (before, after))
    return [
        Change(key, old[key][0], value, old[key][1], interval)
        for key, (value, interval) in new.items()
        if key in old
    ]


def _measures(
    document: Mapping[str, Any], candidate: str, by: str
) -> dict[Key, tuple[float, Interval]]:
    found: dict[Key, tuple[float, Interval]] = {}
    for row in document["rows"]:
        timing = row["seconds"].get(candidate)
        if timing is None:
            continue
        value, interval = timing["median"], tuple(timing["interval"])
        if by == "ratio":
            peer = row["seconds"].get(row["fastest_peer"])
            if peer is None:
                continue
            value, interval = (
                value / peer["median"],
                ratio_interval(interval, tuple(peer["interval"])),
            )
        found[_key(row)] = value, interval
    return found


def lines(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    changes: Sequence[Change],
    threshold: float,
    by: str,
) -> list[str]:
    found = [f"A: {_source(before)}", f"B: {_source(after)}"]
    differing = [
        name
        for name in ("cpu", "torch_threads", "instruction_set")
        if before["machine"].get(name) != after["machine"].get(name)
    ]
    if differing and by == "time":
        found.append(f"other machines ({listed(differing)}): --by ratio compares what is in common")
    memory = [_memory(document) for document in (before, after)]
    if memory[0] != memory[1]:
        found.append(f"other conditions: A has {memory[0]} memory for results, B {memory[1]}")
    for name, document in (("A", before), ("B", after)):
        for complaint in document["noise"]["complaints"]:
            found.append(f"{name} was noisy: {complaint}")
    unit = "ms" if by == "time" else "of the fastest peer's time"
    factor = 1e3 if by == "time" else 1.0
    found += ["", f" {'case, ' + unit:<55}{'A':>9}{'B':>9}{'B/A':>7}  verdict"]
    for one in changes:
        found.append(
            f" {_case(one.key)[:54]:<55}{factor * one.before:>9.4g}{factor * one.after:>9.4g}"
            f"{one.factor:>7.2f}  {one.verdict(threshold)}"
        )
    verdicts = [one.verdict(threshold) for one in changes]
    mean = geometric_mean(one.factor for one in changes)
    counts = f"{verdicts.count('SLOWER')} slower, {verdicts.count('faster')} faster"
    means = f"{len(changes)} cases, geometric mean of B/A {mean:.3f}"
    found += ["", f"{means}: {counts} by more than {100 * threshold:g}%, the rest level or within"]
    return found


def _memory(document: Mapping[str, Any]) -> str:
    return str(document["settings"].get("memory", "fresh"))


def _source(document: Mapping[str, Any]) -> str:
    machine, packages = document["machine"], document["machine"]["packages"]
    return (
        f"{document['settings']['started']}, {machine['cpu']}, {machine['torch_threads']} threads, "
        f"rowmax {packages['rowmax']}, torch {packages['torch']}"
    )
