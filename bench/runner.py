"""Runs a case: inputs, gate, interleaved timing, and the comparison with the fastest peer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from .cases import Case, attention_flops, norm_bytes
from .gate import Gate
from .inputs import AttentionInputs, Inputs, make_inputs
from .machine import Limits
from .peers import PEERS, SUBJECT, Function, run_pass, subject
from .timing import Budget, Timing, geometric_mean, interleave


@dataclass(frozen=True)
class Row:
    """One line of the table. A candidate is either in `timings` or in `faults`."""

    case: Case
    timings: dict[str, Timing]
    faults: dict[str, str]  # what the gate found, or the error that was raised
    first_call: dict[str, float]  # seconds of the first call, compilation included
    rate: float | None  # rowmax: operations a second, or bytes a second for a norm
    share: float | None  # of the machine's limit for that rate

    @property
    def fastest_peer(self) -> str | None:
        peers = {name: t.median for name, t in self.timings.items() if name != SUBJECT}
        return min(peers, key=lambda name: peers[name]) if peers else None

    @property
    def ratio(self) -> float | None:
        """Time of the fastest peer in times of rowmax: above 1, rowmax is faster."""
        peer = self.fastest_peer
        if peer is None or SUBJECT not in self.timings:
            return None
        return self.timings[peer].median / self.timings[SUBJECT].median

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.case.suite,
            "kind": self.case.kind,
            "shape": list(self.case.shape),
            "pass": self.case.step,
            "seconds": {
                name: {
                    "median": timing.median,
                    "low_quartile": timing.low,
                    "high_quartile": timing.high,
                    "rounds": timing.rounds,
                    "first_call": self.first_call[name],
                }
                for name, timing in self.timings.items()
            },
            "faults": self.faults,
            "fastest_peer": self.fastest_peer,
            "ratio": self.ratio,
            "rowmax_rate_per_s": self.rate,
            "share_of_limit": self.share,
        }


def candidates(case: Case, peers: Iterable[str], backend: str) -> dict[str, Function]:
    """rowmax first, then the peers of the case's suite that were asked for."""
    makers = PEERS[case.suite]
    functions = {SUBJECT: subject(case.suite, case.kind, backend)}
    functions |= {name: makers[name](case.kind) for name in makers if name in tuple(peers)}
    return functions


def run_case(case: Case, functions: Mapping[str, Function], budget: Budget, limits: Limits) -> Row:
    """Gate first, then time what passed."""
    inputs = make_inputs(case)
    gate = Gate(case, inputs)
    calls: dict[str, Callable[[], object]] = {}
    faults: dict[str, str] = {}
    first_call: dict[str, float] = {}
    for name, function in functions.items():
        call = partial(run_pass, function, inputs, backward=case.backward)
        started = perf_counter()
        try:
            call()
            first_call[name] = perf_counter() - started
            fault = gate.fault(function, is_subject=name == SUBJECT)
        except Exception as error:
            # A candidate that can't run is a line in the report, not the end of it.
            fault = f"{type(error).__name__}: {first_line(error)}"
        if fault is None:
            calls[name] = call
        else:
            faults[name] = fault
    timings = interleave(calls, budget)
    rate = share = None
    if SUBJECT in timings:
        work, limit = _work_and_limit(case, inputs, limits)
        rate = work / timings[SUBJECT].median
        share = rate / limit
    return Row(case, timings, faults, first_call, rate, share)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _work_and_limit(case: Case, inputs: Inputs, limits: Limits) -> tuple[int, float]:
    """Operations and operations a second, or bytes and bytes a second."""
    if isinstance(inputs, AttentionInputs):
        work = attention_flops(inputs.pairs, inputs.q.shape[-1], backward=case.backward)
        return work, limits.float32_flops
    work = norm_bytes(case.kind, case.shape, backward=case.backward)
    return work, limits.copy_rate(inputs.x.numel())


def group_means(rows: Iterable[Row]) -> dict[tuple[str, str, str], tuple[float, int]]:
    """(suite, kind, pass) -> geometric mean of the ratios and how many they are."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            key = (row.case.suite, row.case.kind, row.case.step)
            groups.setdefault(key, []).append(row.ratio)
    return {key: (geometric_mean(ratios), len(ratios)) for key, ratios in groups.items()}
