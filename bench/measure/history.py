"""`--csv`: an append-only history, a line for each candidate of each case of each run."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..options import UsageError

FIELDS = (
    *("date", "rowmax", "torch", "cpu", "gpu", "threads", "suite", "dtype", "kind", "shape"),
    *("pass", "candidate", "median_s", "interval_low_s", "interval_high_s", "rounds"),
    *("outliers", "first_call_s", "peak_memory_bytes", "ratio", "level", "noisy_run"),
)


def check(path: Path) -> None:
    """UsageError where `path` holds something else than such a history, before anything is run."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = next(csv.reader(file), None)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--csv: can't read {path}: {error}") from error
    if head is not None and tuple(head) != FIELDS:
        raise UsageError(
            f"--csv: {path} has other columns than this version writes; give a new file"
        )


def append(path: Path, document: Mapping[str, Any]) -> None:
    """The lines of one run, at the end of what is there."""
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerows(_lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    machine = document["machine"]
    run = {
        "date": document["settings"]["started"],
        "rowmax": machine["packages"]["rowmax"],
        "torch": machine["packages"]["torch"],
        "cpu": machine["cpu"],
        "gpu": machine.get("gpu", {}).get("name", ""),
        "threads": machine["torch_threads"],
        "noisy_run": bool(document["noise"]["complaints"]),
    }
    for row in document["rows"]:
        case = {name: row[name] for name in ("suite", "dtype", "kind", "pass", "ratio", "level")}
        for candidate, timing in row["seconds"].items():
            yield {
                **run,
                **case,
                "shape": "x".join(map(str, row["shape"])),
                "candidate": candidate,
                "median_s": timing["median"],
                "interval_low_s": timing["interval"][0],
                "interval_high_s": timing["interval"][1],
                "rounds": timing["rounds"],
                "outliers": timing["outliers"],
                "first_call_s": timing["first_call"],
                "peak_memory_bytes": timing["peak_memory_bytes"],
            }
