"""The table, at most 100 columns wide for the suites of the CPU, and the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import gpu
from .cases import BACKWARD, FORWARD, FORWARD_BACKWARD, Suite, shape_text
from .machine import Limits
from .peers import SUBJECT, absent, peers_of
from .runner import Row, group_means

WIDTH = 100
SCHEMA = 1
# Quartiles further apart than this share of the median: the machine was not quiet.
NOISY = 0.15
_STEPS = {FORWARD: "fwd", FORWARD_BACKWARD: "fwd+bwd", BACKWARD: "bwd"}


def machine_lines(
    machine: Mapping[str, Any], limits: Mapping[str, Limits], suites: Iterable[Suite]
) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    load = machine["load_average"]
    load_text = "unknown" if load is None else " ".join(f"{value:.2f}" for value in load)
    threads = f"{machine['torch_threads']} threads"
    hardware = f"{machine['cpu']}, {machine['instruction_set']}, {threads}"
    lines = [
        f"{hardware}; load average {load_text}",
        f"Python {machine['python']}, {packages}",
    ]
    if "gpu" in machine:
        lines.append(gpu.text(machine["gpu"]))
    lines += [f"measured here: {limit.text()}" for limit in limits.values()]
    missing = dict.fromkeys(name for suite in suites for name in suite.peers if absent(name))
    if missing:
        lines.append(f"peers that are not installed here: {', '.join(missing)}")
    return lines


def header_lines(suite: Suite) -> list[str]:
    names = "".join(f"{name:>{_cell_width(name)}}" for name in (SUBJECT, *peers_of(suite)))
    unit, _ = suite.rate_unit
    line = f"{'kind':<{_kind_width(suite)}} {'shape':<{_shape_width(suite)}} {'pass':<7}{names}"
    line += f"{'ratio':>7}{unit:>8}{'limit':>6}"
    note = "(median ms; ratio: fastest peer / rowmax; limit: share of the machine's)"
    return ["", f"{suite.name} {note}", line, "-" * len(line)]


def row_lines(row: Row) -> list[str]:
    suite = row.case.suite
    cells = "".join(_cell(row, name) for name in (SUBJECT, *peers_of(suite)))
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    rate = "-" if row.rate is None else f"{row.rate / suite.rate_unit[1]:.3g}"
    share = "-" if row.share is None else f"{100 * row.share:.0f}%"
    shape = f"{shape_text(row.case.shape):<{_shape_width(suite)}}"
    line = f"{row.case.kind:<{_kind_width(suite)}} {shape} {_STEPS[row.case.step]:<7}"
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
    rows: Sequence[Row],
    machine: Mapping[str, Any],
    limits: Mapping[str, Limits],
    settings: Mapping[str, Any],
    load_at_end: tuple[float, float, float] | None,
) -> str:
    measured: dict[str, Any] = {}
    for device, limit in limits.items():
        measured |= limit.as_json() if device == "cpu" else {"gpu": limit.as_json()}
    document = {
        "schema": SCHEMA,
        "machine": {**machine, "load_average_at_end": load_at_end},
        "limits": measured,
        "settings": settings,
        "suites": {row.case.suite.name: list(row.case.suite.dimensions) for row in rows},
        "rows": [row.as_json() for row in rows],
        "geometric_means": [
            {"suite": suite, "kind": kind, "pass": step, "ratio": mean, "shapes": count}
            for (suite, kind, step), (mean, count) in group_means(rows).items()
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def _kind_width(suite: Suite) -> int:
    return max(len(kind) for kind in suite.kinds)


def _shape_width(suite: Suite) -> int:
    return max(15, *(len(shape_text(shape)) for shape in suite.shapes))


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
