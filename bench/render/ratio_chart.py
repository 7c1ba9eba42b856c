"""`python -m rowmax.bench chart A.json ...`: a bar chart of the ratios to peers, by kind.

A bar is time of the peer / time of rowmax, the geometric mean over the shapes of a kind and pass.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from ...console import from_extra
from ..options import UsageError, check_outputs, renamed

FASTEST = "fastest"
FORMATS = (".svg", ".png")
# Readable on white and on black: the picture has no background of its own.
_COLOURS = ("#3b7dbd", "#d08a2e", "#4a9a6a", "#a5609d")
_INK = "#7d8590"
_ROW_INCHES = 0.19
_LINEAR_TO = 6.0  # larger ratios would press the others against the axis


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", metavar="JSON", type=Path, help="of `speed --json`")
    command.add_argument(
        "--peers", default=FASTEST, metavar="NAMES", help="a bar for each; default: the fastest"
    )
    command.add_argument("--output", required=True, metavar="FILE", type=Path, help=".svg or .png")


def run(options: argparse.Namespace) -> int:
    """The command. Exit status 2 where a file holds nothing to draw."""
    if options.output.suffix not in FORMATS:
        raise UsageError(f"--output: expected a name in {' or '.join(FORMATS)}")
    check_outputs({"--output": options.output})
    peers = options.peers.split(",")
    documents = [_document(path) for path in options.files]
    ratios = ratios_of([row for document in documents for row in document["rows"]], peers)
    if not ratios:
        raise UsageError(f"{options.files[0]}: no timing of rowmax and of {' or '.join(peers)}")
    machines = dict.fromkeys(_machine(document) for document in documents)
    _draw(ratios, peers, ", ".join(machines), options.output)
    return 0


def ratios_of(rows: list[dict[str, Any]], peers: list[str]) -> dict[tuple[str, str], list[float]]:
    """For each (kind, pass): the ratio to each peer, NaN where it has no timing."""
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        medians = {name: timing["median"] for name, timing in row["seconds"].items()}
        ours = medians.pop("rowmax", None)
        if ours is None or not medians:
            continue
        medians[FASTEST] = min(medians.values())
        by_peer = ratios.setdefault((renamed("--kind", row["kind"]), row["pass"]), {})
        for peer in peers:
            if peer in medians:
                by_peer.setdefault(peer, []).append(medians[peer] / ours)
    return {
        key: [geometric_mean(found[p]) if p in found else math.nan for p in peers]
        for key, found in ratios.items()
        if found
    }


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = document["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: no result of `speed --json` ({error})") from None
    if not isinstance(rows, list):
        raise UsageError(f"{path}: no result of `speed --json`")
    return document


def _machine(document: dict[str, Any]) -> str:
    machine = document["machine"]
    gpu = machine.get("gpu")
    name = machine["cpu"] if gpu is None else gpu["name"]
    return f"{name}, noisy" if document["noise"]["complaints"] else str(name)


def _draw(
    ratios: dict[tuple[str, str], list[float]], peers: list[str], machine: str, output: Path
) -> None:
    with from_extra("pictures"):
        import matplotlib.patches
        from matplotlib.figure import Figure

    rows = len(ratios) * (len(peers) + 0.6)
    figure = Figure(figsize=(7.2, 0.9 + rows * _ROW_INCHES), layout="constrained")
    axes = figure.add_subplot()
    at = 0.0
    ticks = []
    for key, values in ratios.items():
        ticks.append((at + (len(peers) - 1) / 2, " ".join(key)))
        for index, value in enumerate(values):
            if not math.isnan(value):
                colour = _COLOURS[index % len(_COLOURS)]
                axes.barh(at + index, value, 0.9, color=colour)
                axes.text(value, at + index, f" {value:.2f}", va="center", color=_INK, size=8)
        at += len(peers) + 0.6
    largest = max(value for values in ratios.values() for value in values if not math.isnan(value))
    if largest > _LINEAR_TO:
        axes.set_xscale("log")
    axes.axvline(1.0, color=_INK, linewidth=1)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.invert_yaxis()
    axes.set_xlabel(f"time of the peer / time of rowmax (above 1: rowmax is faster); {machine}")
    axes.xaxis.label.set(color=_INK, size=9)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.spines[:].set_visible(False)
    if peers != [FASTEST]:
        handles = [
            matplotlib.patches.Patch(color=_COLOURS[index % len(_COLOURS)], label=peer)
            for index, peer in enumerate(peers)
        ]
        axes.legend(handles=handles, frameon=False, labelcolor=_INK, fontsize=9)
    metadata = {"Date": None} if output.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rowmax"}):
        figure.savefig(output, transparent=True, dpi=200, metadata=metadata)
