"""The table, at most 100 columns wide for the suites of the CPU, and the JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..machine import gpu
from ..machine.gpu import Limits
from ..peers.candidates import ROWMAX, absent
from . import summary
from .cases import IN_SHORT, Case, Suite, bound_by_memory, dtype_text, shape_text
from .noise import Watch
from .runner import Row

WIDTH = 100
SCHEMA = 3
# Quartiles further apart than this share of the median: the machine was not quiet.
NOISY = 0.15
_MODEL_KINDS = {
    "transformer": "a training step of the reference Transformer",
    "encoder": "a training step of torch's nn.TransformerEncoder",
}
_MAX_HEADING = 12  # of a function's name
_HEADINGS = {"sdpa-math": "math", "onnxruntime": "ort", "openvino": "ov"}


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
        *textwrap.wrap(f"Python {machine['python']}, {packages}", WIDTH, break_on_hyphens=False),
    ]
    if "gpu" in machine:
        lines.append(gpu.text(machine["gpu"]))
    for limit in limits.values():
        lines += textwrap.wrap(f"measured here: {limit.text()}", WIDTH, break_on_hyphens=False)
    missing = dict.fromkeys(name for suite in suites for name in suite.peers if absent(name))
    if missing:
        lines.append(f"peers that are not installed here: {', '.join(missing)}")
    return lines


def header_lines(suite: Suite, dtype: torch.dtype, peers: Sequence[str]) -> list[str]:
    notes = [
        "median ms",
        f"ratio: fastest peer / {ROWMAX} (=: level, the 95% intervals overlap)",
        "peak: share of the limit",
    ]
    notes += [f"{_HEADINGS[name]}: {name}" for name in peers if name in _HEADINGS]
    lines = ["", f"{suite.name}, {dtype_text(dtype)}", *_wrapped("; ".join(notes))]
    if dtype.itemsize == 2 and suite.attention and not suite.on_gpu:
        lines += _wrapped(
            "the limit is that of float32; what takes dot-product instructions for bfloat16 "
            f"({ROWMAX} and some peers, where the CPU has them) may pass it"
        )
    cells = "".join(f"{heading(name):>{_cell_width(name)}}" for name in (ROWMAX, *peers))
    line = f" {'shape':<{_shape_width(suite)}}pass{cells}{'ratio':>6}{'rate':>6}{'peak':>5}"
    return [*lines, line, "-" * len(line)]


def kind_line(case: Case) -> str:
    """The heading of a kind: its name, and the unit and the limit of its rates."""
    unit, _ = _rate_unit(case)
    if case.suite.model:
        return f"{case.kind} ({unit}; {_MODEL_KINDS[case.kind]})"
    limit = "a large copy" if case.suite.on_gpu else "x.clone(), timed in turns with it"
    if not case.bound_by_memory:
        limit = "a matrix product" if case.suite.on_gpu else "float32 FMA from registers"
    return f"{case.kind} ({unit}; limit: {limit})"


def row_lines(row: Row, peers: Sequence[str], printed: set[str]) -> list[str]:
    """The line, and below it why a candidate is missing from it; each reason once in `printed`."""
    suite = row.case.suite
    cells = "".join(_cell(row, name) for name in (ROWMAX, *peers))
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}" + ("=" if row.level else "")
    rate = "-" if row.rate is None else f"{row.rate / _rate_unit(row.case)[1]:.3g}"
    share = "-" if row.share is None else f"{100 * row.share:.0f}%"
    shape = f"{shape_text(row.case.shape):<{_shape_width(suite)}}"
    mark = "~" if is_noisy(row) else " "
    line = f"{mark}{shape}{IN_SHORT[row.case.step]:<4}{cells}{ratio:>6}{rate:>6}{share:>5}"
    reasons = [f"{name} not timed: {fault}" for name, fault in row.faults.items()]
    reasons += [f"{name} impossible: {why}" for name, why in row.impossible.items()]
    reasons += [f"{name} not done: {reason}" for name, reason in row.not_done.items()]
    new = [reason for reason in reasons if reason not in printed]
    printed.update(new)
    return [line, *(text for reason in new for text in _wrapped(reason))]


def detail_lines(rows: Sequence[Row]) -> list[str]:
    """The second table: what the first has no room for, rowmax beside its fastest peer."""
    found = ["", f"in detail: {ROWMAX} / its fastest peer; outliers of all candidates' rounds"]
    width = max((len(_detail_name(row)) for row in rows), default=4) + 1
    head = f" {'case':<{width}}{'ratio, 95%':>14}{'GFLOP/s':>8}{'GB/s':>7}"
    head += f"{'peak MiB':>14}{'first call, s':>14}{'outliers':>10}"
    found += [head, "-" * len(head)]
    for row in rows:
        interval = row.ratio_interval
        text = "-" if interval is None else f"{interval[0]:.2f} - {interval[1]:.2f}"
        calls = _pair(row, {name: _seconds(s) for name, s in row.first_call.items()})
        memory = {n: f"{b / 2**20:.1f}" for n, b in row.memory.items() if b is not None}
        taken = sum(timing.rounds for timing in row.timings.values())
        far = sum(timing.outliers for timing in row.timings.values())
        found.append(
            f" {_detail_name(row):<{width}}{text:>14}{_achieved(row, row.flops):>8}"
            f"{_achieved(row, row.moved):>7}{_pair(row, memory):>14}{calls:>14}"
            f"{f'{far} of {taken}':>10}"
        )
    return found


def _detail_name(row: Row) -> str:
    case = row.case
    dtype = dtype_text(case.dtype)
    dtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(dtype, dtype)
    name = f"{case.kind} {shape_text(case.shape)} {IN_SHORT[case.step]} {dtype}"
    return textwrap.shorten(name, 31, placeholder="...") if len(name) <= 31 else name[:30] + "."


def _seconds(seconds: float) -> str:
    return "<0.01" if seconds < 0.01 else f"{seconds:.2g}"


def _pair(row: Row, values: Mapping[str, str]) -> str:
    peer = row.fastest_peer
    return f"{values.get(ROWMAX, '-')} / {'-' if peer is None else values.get(peer, '-')}"


def _achieved(row: Row, work: int | None) -> str:
    if work is None or ROWMAX not in row.timings:
        return "-"
    rate = work / row.timings[ROWMAX].median / 1e9
    return "<0.01" if rate < 0.01 else f"{rate:.3g}"


def noise_lines(
    complaints: Sequence[str], cpus: list[int] | None, watch: Watch, memory: str
) -> list[str]:
    """The noise of the run; a noisy run says that it is not to be quoted."""
    where = "not pinned" if cpus is None else f"pinned to CPUs {', '.join(map(str, cpus))}"
    found = [f"{where}, memory {memory}"]
    if watch.probes:
        varied, stolen = f"{100 * watch.drift:.0f}%", f"{100 * watch.stolen:.0f}%"
        found[0] += (
            f"; the clock's probe varied by {varied}, other programs took {stolen} of its time"
        )
    if complaints:
        text = f"NOISY RUN, not to be quoted: {'; '.join(complaints)}"
        found += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return found


def heading(name: str) -> str:
    """The heading of a candidate's column."""
    return _HEADINGS.get(name, name.rpartition(":")[2][-_MAX_HEADING:])


def is_noisy(row: Row) -> bool:
    return any(timing.spread > NOISY for timing in row.timings.values())


def summary_lines(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    lines = summary.lines(rows)
    noisy = sum(map(is_noisy, rows))
    if noisy:
        lines.append(
            f"noise: {noisy} of {len(rows)} lines, marked ~, hold a timing whose quartiles are "
            f"more than {100 * NOISY:.0f}% apart"
        )
    not_done = sum(ROWMAX in row.not_done for row in rows)
    if not_done:
        lines.append(f"{not_done} of {len(rows)} lines rowmax does not do: see 'not done' above")
    impossible = sum(len(row.impossible) for row in rows)
    if impossible:
        lines.append(f"{impossible} timings are impossible here, and not ranked: see above")
    faults = sum(len(row.faults) for row in rows)
    if faults:
        lines.append(f"{faults} timings are missing: see 'not timed' above")
    return lines


def document(
    rows: Sequence[Row],
    machine: Mapping[str, Any],
    limits: Mapping[str, Limits],
    settings: Mapping[str, Any],
    load_at_end: tuple[float, float, float] | None,
    noise: Mapping[str, Any],
) -> dict[str, Any]:
    """The document that `--json` writes, and all other files are made from."""
    measured: dict[str, Any] = {}
    for device, limit in limits.items():
        measured |= limit.as_json() if device == "cpu" else {"gpu": limit.as_json()}
    return {
        "schema": SCHEMA,
        "machine": {**machine, "load_average_at_end": load_at_end},
        "limits": measured,
        "noise": dict(noise),
        "settings": settings,
        "suites": {row.case.suite.name: list(row.case.suite.dimensions) for row in rows},
        "rows": [row.as_json() for row in rows],
        "geometric_means": [
            {
                "suite": group.suite,
                "kind": group.kind,
                "dtype": None if group.dtype is None else dtype_text(group.dtype),
                "pass": group.step,
                "ratio": mean.ratio,
                "least": mean.least,
                "cells": mean.cells,
            }
            for group, mean in summary.group_means(rows).items()
        ],
        "slower_than_a_peer": [slower.text() for slower in summary.slower_than_a_peer(rows)],
        "gains_of_masks": [
            {
                "suite": gain.suite,
                "kind": gain.kind,
                "against": gain.unmasked,
                "dtype": dtype_text(gain.dtype),
                "pass": gain.step,
                "ratio": mean.ratio,
                "least": mean.least,
                "shapes": mean.cells,
            }
            for gain, mean in summary.gains_of_masks(rows).items()
        ],
    }


def _rate_unit(case: Case) -> tuple[str, float]:
    """The unit of rates, and its value."""
    if case.suite.model:
        return "1000 tokens/s", 1e3
    if bound_by_memory(case.suite, case.kind):
        return "GB/s", 1e9
    return ("TFLOP/s", 1e12) if case.suite.on_gpu else ("GFLOP/s", 1e9)


def _shape_width(suite: Suite) -> int:
    shapes = (*suite.shapes, *(shape for own in suite.own_shapes.values() for shape in own))
    return max(15, *(len(shape_text(shape)) for shape in shapes)) + 1


def _cell_width(name: str) -> int:
    return max(7, len(heading(name)) + 1)


def _cell(row: Row, name: str) -> str:
    text = "-"
    if name in row.faults:
        text = "fault"
    elif name in row.impossible:
        text = " impossible"  # wider than its column: a space at least stands before it
    elif name in row.timings:
        text = _milliseconds(row.timings[name].median)
    return f"{text:>{_cell_width(name)}}"


def _milliseconds(seconds: float) -> str:
    """Four digits, in at most six characters."""
    text = f"{1e3 * seconds:.4g}"
    if "e" in text:  # from 10 s on, or under 0.1 us
        text = f"{1e3 * seconds:.0f}"
    return text if len(text) <= 6 else f"{1e3 * seconds:.4f}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        max_lines=4,
        placeholder=" ...",
        break_on_hyphens=False,
    )
