"""Results as Markdown: for a pull request, or the summary of a GitHub Actions job."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure.cases import IN_SHORT
from ..options import UsageError, check_outputs

SUMMARY = "GITHUB_STEP_SUMMARY"
MOST = 20  # failures that are listed


def add_markdown_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--markdown", metavar="FILE", type=Path, help="write a summary for a pull request"
    )
    command.add_argument(
        "--github-summary",
        action="store_true",
        help=f"append it to the summary of the GitHub Actions job, ${SUMMARY}",
    )


def check_markdown(options: argparse.Namespace) -> None:
    """UsageError before any work where it can't be written."""
    check_outputs({"--markdown": options.markdown})
    if options.github_summary and not os.environ.get(SUMMARY):
        raise UsageError(f"--github-summary: ${SUMMARY} is not set: this is no GitHub Actions job")


def write_markdown(options: argparse.Namespace, text: str) -> None:
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if options.github_summary:
        with open(os.environ[SUMMARY], "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, all others to the right."""
    rules = [":--", *("--:" for _ in head[1:])]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in (head, rules, *rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def of_verify(document: Mapping[str, Any]) -> str:
    """Of what `verify --json` writes."""
    machine = document["machine"]
    found = [
        f"### rowmax verify: {'passed ✅' if document['passed'] else 'FAILED ❌'}",
        "",
        f"{machine['cpu']}, torch {machine['packages']['torch']}, {document['seconds']:.0f} s",
        "",
    ]
    rows = []
    for one in document["implementations"]:
        for op in dict.fromkeys(case["op"] for case in one["cases"]):
            cases = [case for case in one["cases"] if case["op"] == op]
            done = [case for case in cases if case["declined"] is None]
            wrong = [case for case in done if not case["passed"] and case["promised"]]
            limits = [(r["of_limit"], case) for case in done for r in case["results"]]
            known = [(value, case) for value, case in limits if value is not None]
            worst, at = max(known, key=lambda pair: pair[0], default=(0.0, None))
            where = "" if at is None else f"{at['kind']} {tuple(at['shape'])} {at['dtype']}"
            counts = str(len(done)), str(len(cases) - len(done)), str(len(wrong))
            rows.append([one["name"], op, f"{worst:.2f}", where, *counts])
    if rows:
        head = ["", "function", "error / allowed", "worst at", "cases", "declined", "failed"]
        found += [*table(head, rows), ""]
    held = [i for one in document["implementations"] for i in one["invariants"]]
    if held:
        kept = sum(one["fault"] is None for one in held)
        found += [f"{kept} of {len(held)} invariants hold.", ""]
    broken = [one for one in document["mutations"] if not one["control"]]
    if broken:
        rejected = sum(one["rejected_by"] is not None for one in broken)
        found += [f"{rejected} of {len(broken)} broken kernels and cheats are rejected.", ""]
    return "\n".join([*found, *_listed("Failures", document["failures"])])


def of_speed(document: Mapping[str, Any]) -> str:
    """Of what `speed --json` writes: medians in ms, the fastest in bold."""
    machine = document["machine"]
    where = f"{machine['cpu']}, {machine['torch_threads']} threads"
    torch = machine["packages"]["torch"]
    found = ["### rowmax speed", "", f"{where}, torch {torch}; medians in ms", ""]
    names = list(dict.fromkeys(name for row in document["rows"] for name in row["seconds"]))
    rows = []
    for row in document["rows"]:
        medians = {name: one["median"] for name, one in row["seconds"].items()}
        least = min(medians.values(), default=0.0)
        cells = [
            "" if name not in medians else _bold(f"{1e3 * medians[name]:.4g}", medians[name], least)
            for name in names
        ]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        step = IN_SHORT.get(row["pass"], row["pass"])
        case = f"{row['kind']} {tuple(row['shape'])} {step} {row['dtype']}"
        rows.append([case, *cells, ratio])
    found += [*table(["case", *names, "fastest peer / rowmax"], rows), ""]
    faults = [
        f"{row['kind']} {tuple(row['shape'])}: {name}: {fault}"
        for row in document["rows"]
        for name, fault in {**row["faults"], **row["impossible"]}.items()
    ]
    noisy = document["noise"]["complaints"]
    if noisy:
        found += [f"**Noisy run, not to be quoted:** {'; '.join(noisy)}", ""]
    return "\n".join([*found, *_listed("Not timed", faults)])


def of_compare(
    changes: Sequence[tuple[str, float, float, str]], notes: Sequence[str], threshold: float
) -> str:
    """Of `compare`: case, before, after and verdict of each; what is only in one of the runs."""
    slower = [one for one in changes if one[3] == "SLOWER"]
    good = not slower and not notes
    title = "no regression ✅" if good else f"{len(slower)} slower ❌"
    counts = f"slower by more than {100 * threshold:g} %, with intervals that do not overlap"
    found = [f"### rowmax compare: {title}", "", f"{len(changes)} cases; {counts}, counts.", ""]
    order = {"SLOWER": 0, "faster": 1}
    rows = [
        [case, f"{before:.4g}", f"{after:.4g}", f"{after / before:.2f}", verdict]
        for case, before, after, verdict in sorted(changes, key=lambda one: order.get(one[3], 2))
    ]
    if rows:
        found += [*table(["case", "A", "B", "B/A", "verdict"], rows), ""]
    return "\n".join([*found, *_listed("In one run alone", notes)])


def _bold(text: str, value: float, least: float) -> str:
    return f"**{text}**" if value == least else text


def _listed(title: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    more = [f"- ... and {len(texts) - MOST} more"] if len(texts) > MOST else []
    return [f"{title}: {len(texts)}", "", *(f"- {_cell(text)}" for text in texts[:MOST]), *more, ""]
