"""The table, at most 100 columns wide, and the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .cases import FORWARD, SUITES, shape_text
from .machine import Limits
from .peers import PEERS, SUBJECT
from .runner import Row, group_means

WIDTH = 100
SCHEMA = 1
# Quartiles further apart than this share of the median: the machine was not quiet.
NOISY = 0.15


def machine_lines(machine: dict[str, Any], limits: Limits) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    load = machine["load_average"]
    load_text = "unknown" if load is None else " ".join(f"{value:.2f}" for value in load)
    rate = max(limits.copy_bytes)  # the largest copy
    hardware = f"{machine['cpu']}, {machine['instruction_set']}, {limits.threads} threads"
    peak = f"float32 FMA {limits.float32_flops / 1e9:.0f} GFLOP/s"
    copy = f"copy of {4 * rate >> 20} MiB {limits.copy_bytes[rate] / 1e9:.1f} GB/s"
    return [
        f"{hardware}; load average {load_text}",
        f"Python {machine['python']}, {packages}",
        f"measured here: {peak}, {copy}",
    ]


def header_lines(suite: str) -> list[str]:
    names = "".join(f"{name:>{_cell_width(name)}}" for name in (SUBJECT, *PEERS[suite]))
    unit = "GFLOP/s" if suite == "cpu-attention" else "GB/s"
    line = f"{'kind':<{_kind_width(suite)}} {'shape':<15} {'pass':<7}{names}"
    line += f"{'ratio':>7}{unit:>8}{'limit':>6}"
    note = "(median ms; ratio: fastest peer / rowmax; limit: share of the machine's)"
    return ["", f"{suite} {note}", line, "-" * len(line)]


def row_lines(row: Row) -> list[str]:
    suite = row.case.suite
    cells = "".join(_cell(row, name) for name in (SUBJECT, *PEERS[suite]))
    step = "fwd" if row.case.step == FORWARD else "fwd+bwd"
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    rate = "-" if row.rate is None else f"{row.rate / 1e9:.3g}"
    share = "-" if row.share is None else f"{100 * row.share:.0f}%"
    line = f"{row.case.kind:<{_kind_width(suite)}} {shape_text(row.case.shape):<15} {step:<7}"
    line += f"{cells}{ratio:>7}{rate:>8}{share:>6}{' ~' if is_noisy(row) else ''}"
    faults = [_clip(f"  {name} not timed: {fault}") for name, fault in row.faults.items()]
    return [line, *faults]


def is_noisy(row: Row) -> bool:
    return any(timing.spread > NOISY for timing in row.timings.values())


def summary_lines(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    lines = ["", "geometric means of the ratio, fastest peer / rowmax (above 1: rowmax is faster)"]
    for (suite, kind, step), (mean, count) in group_means(rows).items():
        shapes = f"{count} shape" + ("s" if count != 1 else "")
        lines.append(f"  {suite:<14} {kind:<15} {step:<17} {mean:6.2f}   over {shapes}")
    if len(lines) == 2:
        lines.append("  none: no line has both rowmax and a peer")
    noisy = sum(map(is_noisy, rows))
    if noisy:
        lines.append(
            f"noise: {noisy} of {len(rows)} lines, marked ~, hold a timing whose quartiles are "
            f"more than {100 * NOISY:.0f}% apart"
        )
    faults = sum(len(row.faults) for row in rows)
    if faults:
        lines.append(f"{faults} timings are missing: see 'not timed' above")
    return lines


def as_json(
    rows: Iterable[Row],
    machine: dict[str, Any],
    limits: Limits,
    settings: dict[str, Any],
    load_at_end: tuple[float, float, float] | None,
) -> str:
    rows = list(rows)
    document = {
        "schema": SCHEMA,
        "machine": machine | {"load_average_at_end": load_at_end},
        "limits": limits.as_json(),
        "settings": settings,
        "suites": {name: list(SUITES[name].dimensions) for name in {r.case.suite for r in rows}},
        "rows": [row.as_json() for row in rows],
        "geometric_means": [
            {"suite": suite, "kind": kind, "pass": step, "ratio": mean, "shapes": count}
            for (suite, kind, step), (mean, count) in group_means(rows).items()
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def _kind_width(suite: str) -> int:
    return max(len(kind) for kind in SUITES[suite].kinds)


def _cell_width(name: str) -> int:
    return max(9, len(name) + 1)


def _cell(row: Row, name: str) -> str:
    text = "-"
    if name in row.faults:
        text = "fault"
    elif name in row.timings:
        text = f"{1e3 * row.timings[name].median:.3f}"
    return f"{text:>{_cell_width(name)}}"


def _clip(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
