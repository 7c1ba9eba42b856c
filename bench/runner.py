"""Runs cases: inputs, gate, interleaved timing, and the comparison with the fastest peer."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from .cases import Case, attention_flops, norm_bytes
from .gate import Gate
from .inputs import AttentionInputs, Inputs, make_inputs
from .machine import Limits
from .peers import SUBJECT, Function, measured_call, oracle, peers_of, run_pass, subject
from .timing import Budget, Timer, Timing, geometric_mean, interleave


@dataclass(frozen=True)
class Row:
    """One line of the table. A candidate is either in `timings` or in `faults`."""

    case: Case
    timings: dict[str, Timing]
    faults: dict[str, str]  # what the gate found, or the error that was raised
    failed: bool  # whether rowmax is among the faults, or the gate's findings are
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
            "suite": self.case.suite.name,
            "dtype": str(self.case.suite.dtype).removeprefix("torch."),
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
    makers = peers_of(case.suite)
    functions = {SUBJECT: subject(case.suite, case.kind, backend)}
    functions |= {name: makers[name](case.kind) for name in makers if name in tuple(peers)}
    return functions


def run_cases(
    cases: Sequence[Case],
    functions: Mapping[str, Function],
    budget: Budget,
    limits: Limits,
    timer: Timer,
) -> Iterator[Row]:
    """The passes of one kind at one shape, which share inputs, oracle and what was compiled."""
    inputs = make_inputs(cases[0])
    naive = oracle(cases[0].suite, cases[0].kind)
    gate = Gate(inputs, naive, backward=any(case.backward for case in cases))
    for case in cases:
        yield _run_case(case, inputs, gate, functions, budget, limits, timer)
        release_memory()


def _run_case(
    case: Case,
    inputs: Inputs,
    gate: Gate,
    functions: Mapping[str, Function],
    budget: Budget,
    limits: Limits,
    timer: Timer,
) -> Row:
    """Gate first, then time what passed."""
    calls: dict[str, Callable[[], object]] = {}
    faults: dict[str, str] = {}
    first_call: dict[str, float] = {}
    failed = False
    for name, function in functions.items():
        is_subject = name == SUBJECT
        started = perf_counter()
        try:
            with warnings.catch_warnings():
                if not is_subject:  # torch warns of each reason why a path can't do the case
                    warnings.simplefilter("ignore", UserWarning)
                run_pass(function, inputs, backward=case.backward)
                first_call[name] = perf_counter() - started
                fault = gate.fault(function, backward=case.backward, is_subject=is_subject)
            if fault is None:
                calls[name] = measured_call(function, inputs, case.step)
            else:
                failed = True
        except Exception as error:
            # A candidate that can't run is a line in the report, not the end of it.
            fault = f"{type(error).__name__}: {first_line(error)}"
            failed |= is_subject
        if fault is not None:
            faults[name] = fault
            release_memory()
    timings = interleave(calls, budget, timer)
    for name in calls.keys() - timings.keys():
        faults[name] = "out of GPU memory beside the other candidates"
    rate = share = None
    if SUBJECT in timings:
        work, limit = _work_and_limit(case, inputs, limits)
        rate = work / timings[SUBJECT].median
        share = rate / limit
    return Row(case, timings, faults, failed, first_call, rate, share)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def release_memory() -> None:
    """Gives back what a graph or an error's traceback held of the GPU's memory."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _work_and_limit(case: Case, inputs: Inputs, limits: Limits) -> tuple[int, float]:
    """Operations and operations a second, or bytes and bytes a second."""
    if isinstance(inputs, AttentionInputs):
        return attention_flops(inputs.pairs, inputs.q.shape[-1], case.step), limits.flops
    work = norm_bytes(case.kind, case.shape, case.step, inputs.x.element_size())
    return work, limits.copy_rate(inputs.x.nbytes)


def group_means(rows: Iterable[Row]) -> dict[tuple[str, str, str], tuple[float, int]]:
    """(suite, kind, pass) -> geometric mean of the ratios and how many they are."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            key = (row.case.suite.name, row.case.kind, row.case.step)
            groups.setdefault(key, []).append(row.ratio)
    return {key: (geometric_mean(ratios), len(ratios)) for key, ratios in groups.items()}
