"""`speed`: anyone's own kernel, timed beside rowmax and every peer that is here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..candidate import Candidate, load
from ..conduct.guard import Guard
from ..machine import gpu
from ..machine.host import describe, measure_limits
from ..options import renamed
from ..peers.candidates import ONLY_BY_NAME, ROWMAX, SLOW_TO_START, Function, peers_of
from . import report
from .cases import FORWARD, FORWARD_BACKWARD, PARTS, Shape, cases_of, parts_of, suite_of
from .runner import Row, candidates, function_of, run_cases
from .timing import Budget, timer_for


@dataclass(frozen=True)
class Speeds:
    """The lines that were measured; `print(speeds)` is the table."""

    rows: list[Row]
    text: str

    def __str__(self) -> str:
        return self.text


def speed(
    function: Callable[..., Any] | str | None = None,
    *,
    name: str = "yours",
    shapes: Sequence[Shape] | None = None,
    kinds: Sequence[str] | None = None,
    op: str | None = None,
    layout: str | None = None,
    dtype: torch.dtype = torch.float32,
    backward: bool = True,
    device: str = "cpu",
    peers: Sequence[str] | None = None,
    backend: str = "auto",
    seconds: float = 1.0,
) -> Speeds:
    """Times attention, or a norm: A B C, A B C, ..., each candidate after it has passed the gate.

    Args:
        function: an attention, norm or softmax, or where it is to be found, as `verify` takes it,
            in the column `name`; None times rowmax and the peers alone. One that is not right is
            not timed: see a row's `faults`.
        shapes: (B, H, L, D), (B, H, Lq, Lk, D) or (B, Hq, Hkv, Lq, Lk, D) each, by default
            (8, 8, 512, 64); or (rows, columns), by default (4096, 1024).
        kinds: as of `bench speed --kind`: "full", "causal", "padded+dropout", ...; of a norm, its
            name alone.
        op: what `function` computes, where its name does not say it. layout: of its q, k and v,
            "bhld", "blhd" or "packed"; for "blhd" and "packed" all candidates get tensors that are
            (B, L, H, D) in memory.
        backward: also forward and backward together.
        peers: their names; None takes those of the suite that need no compilation.
        seconds: to spend on each line.

    Raises:
        ValueError: an unknown kind, peer or device, or a shape that no kind suits.
    """
    guard = Guard()
    candidate = None
    if isinstance(function, str):
        candidate = load(function, op=op, layout=layout, backward=backward)
    elif function is not None:
        candidate = Candidate(function, name, op=op, layout=layout, backward=backward)
    computes = candidate.op if candidate is not None else op or "attention"
    is_attention = computes == "attention"
    kinds = kinds or (("full", "causal") if is_attention else (computes,))
    shapes = shapes or (((8, 8, 512, 64),) if is_attention else ((4096, 1024),))
    suite = suite_of(device, attention=is_attention)
    if suite is None:
        raise ValueError(f"speed: device: expected cpu or cuda, got {device!r}")
    suite = replace(suite, dtypes=(dtype,))
    current = [renamed("--kind", kind) for kind in kinds]
    for kind, name_now in zip(kinds, current, strict=True):
        if kind != name_now:
            told = f"speed: kinds: {kind!r} is deprecated: use {name_now!r}"
            warnings.warn(told, DeprecationWarning, stacklevel=2)
    kinds = current
    for kind in kinds:
        known = ", ".join(PARTS) + " joined by +" if is_attention else computes
        if not (parts_of(kind) <= set(PARTS) if is_attention else kind == computes):
            raise ValueError(f"speed: kinds: expected {known}, got {kind!r}")
    for shape in shapes:
        if not suite.takes(tuple(shape)):
            sizes = "4, 5 or 6 sizes" if is_attention else "rows and columns"
            raise ValueError(f"speed: shapes: expected {sizes}, got {tuple(shape)}")
    here = list(peers_of(suite))
    for peer in peers or ():
        if peer not in here:
            raise ValueError(f"speed: peers: expected names of {', '.join(here)}, got {peer!r}")
    if name in (*here, ROWMAX):
        raise ValueError(f"speed: name: {name!r} is the name of another column")
    left_out = (*SLOW_TO_START, *ONLY_BY_NAME)
    chosen = peers if peers is not None else [n for n in here if n not in left_out]
    steps = (FORWARD, FORWARD_BACKWARD) if backward else (FORWARD,)
    cases = cases_of(suite, (dtype,), kinds, steps, [tuple(shape) for shape in shapes])
    if not cases:
        raise ValueError("speed: no kind suits a shape: nothing to measure")
    if candidate is not None and candidate.layout != "bhld":
        cases = [replace(case, layout="blhd") for case in cases]
    timer = timer_for(device)
    limits = measure_limits() if device == "cpu" else gpu.measure_limits(dtype, timer)
    columns = [*chosen, *(() if candidate is None else (name,))]
    text = report.machine_lines(describe(), {device: limits}, [suite])
    text += report.header_lines(suite, dtype, columns)
    rows: list[Row] = []
    printed: set[str] = set()
    last: str | None = None
    budget = Budget(seconds, 5, 200)
    for case in cases:
        if case.kind != last:
            last = case.kind
            text.append(report.kind_line(case))
        functions: dict[str, Function] = candidates(case, chosen, backend)
        if candidate is not None:
            functions[name] = function_of(candidate)
        foreign = {} if candidate is None else {name: guard}
        for row in run_cases([case], functions, budget, limits, timer, foreign):
            rows.append(row)
            text += report.row_lines(row, columns, printed)
    return Speeds(rows, "\n".join([*text, *report.detail_lines(rows)]))
