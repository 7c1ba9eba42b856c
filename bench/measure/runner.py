"""Runs cases: inputs, gate, interleaved timing, and the comparison with the fastest peer."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from ...kernels.testing.memory import peak_bytes
from ..machine.host import Limits
from ..peers.candidates import (
    ROWMAX,
    Function,
    measured_call,
    naive,
    peers_of,
    rowmax_function,
    run_pass,
)
from ..peers.packages import UnsupportedError
from .cases import (
    Case,
    attention_bytes,
    attention_flops,
    dtype_text,
    norm_bytes,
    norm_flops,
)
from .gate import Gate
from .inputs import AttentionInputs, Inputs, make_inputs
from .intervals import Interval, overlap, ratio_interval
from .isolated import LostError, results
from .models import ModelInputs
from .timing import Budget, Timer, Timing, interleave, timer_for

COPY = "copy"  # the yardstick among the calls that are timed; no candidate


@dataclass(frozen=True)
class Row:
    """One line of the table. A candidate is in `timings`, in `faults` or in `not_done`."""

    case: Case
    timings: dict[str, Timing]
    faults: dict[str, str]  # the failure at the gate, or the error that was raised
    not_done: dict[str, str]  # reasons of candidates that do not support the case
    failed: bool  # whether rowmax is among the faults, or the gate's findings are
    first_call: dict[str, float]  # seconds of the first call, compilation included
    rate: float | None  # rowmax: operations a second, or bytes a second for a norm
    share: float | None  # of the machine's limit for that rate
    copy: Timing | None  # of `x.clone()` in the same turns, where memory is the limit
    memory: dict[str, int | None] = field(default_factory=dict)  # bytes at a call's peak
    flops: int | None = None  # operations that the case is worth
    moved: int | None = None  # bytes that any implementation must move

    @property
    def fastest_peer(self) -> str | None:
        peers = {name: t.median for name, t in self.timings.items() if name != ROWMAX}
        return min(peers, key=lambda name: peers[name]) if peers else None

    @property
    def ratio(self) -> float | None:
        """Time of the fastest peer in times of rowmax: above 1, rowmax is faster."""
        peer = self.fastest_peer
        if peer is None or ROWMAX not in self.timings:
            return None
        return self.timings[peer].median / self.timings[ROWMAX].median

    @property
    def ratio_interval(self) -> Interval | None:
        """Where the ratio lies when both medians are in their 95 % intervals."""
        peer = self.fastest_peer
        if peer is None or ROWMAX not in self.timings:
            return None
        return ratio_interval(self.timings[peer].interval, self.timings[ROWMAX].interval)

    @property
    def level(self) -> bool:
        """Whether neither rowmax nor the fastest peer is faster: their intervals overlap."""
        peer = self.fastest_peer
        if peer is None or ROWMAX not in self.timings:
            return False
        return overlap(self.timings[peer].interval, self.timings[ROWMAX].interval)

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.case.suite.name,
            "dtype": dtype_text(self.case.dtype),
            "kind": self.case.kind,
            "shape": list(self.case.shape),
            "pass": self.case.step,
            "seconds": {
                name: {
                    "median": timing.median,
                    "low_quartile": timing.low,
                    "high_quartile": timing.high,
                    "interval": list(timing.interval),
                    "outliers": timing.outliers,
                    "rounds": timing.rounds,
                    "first_call": self.first_call[name],
                    "peak_memory_bytes": self.memory.get(name),
                }
                for name, timing in self.timings.items()
            },
            "faults": self.faults,
            "not_done": self.not_done,
            "fastest_peer": self.fastest_peer,
            "ratio": self.ratio,
            "ratio_interval": None if self.ratio_interval is None else list(self.ratio_interval),
            "level": self.level,
            "flops": self.flops,
            "bytes_to_move": self.moved,
            "rowmax_rate_per_s": self.rate,
            "limit": "copy" if self.case.bound_by_memory else "arithmetic",
            "share_of_limit": self.share,
            "copy_seconds": None if self.copy is None else self.copy.median,
        }


def candidates(case: Case, peers: Iterable[str], backend: str) -> dict[str, Function]:
    """rowmax first, then the peers of the case's suite that were asked for."""
    makers = peers_of(case.suite)
    functions = {ROWMAX: rowmax_function(case.suite, case.kind, backend)}
    functions |= {name: makers[name](case.kind) for name in makers if name in tuple(peers)}
    return functions


def rows_of(
    cases: Sequence[Case], peers: Sequence[str], backend: str, budget: Budget, limits: Limits
) -> Iterator[Row]:
    """`run_cases` of the candidates for one kind, shape and dtype."""
    functions = candidates(cases[0], peers, backend)
    yield from run_cases(cases, functions, budget, limits, timer_for(cases[0].suite.device))


def isolated_rows(
    cases: Sequence[Case],
    peers: Sequence[str],
    backend: str,
    budget: Budget,
    limits: Limits,
    seconds: float,
) -> Iterator[Row]:
    """`rows_of` in a process of its own: where it is lost, the rest of its rows say so."""
    done = 0
    try:
        for row in results(rows_of, cases, peers, backend, budget, limits, seconds=seconds):
            done += 1
            yield row
    except LostError as error:
        for case in cases[done:]:
            yield Row(case, {}, {ROWMAX: str(error)}, {}, True, {}, None, None, None)


def run_cases(
    cases: Sequence[Case],
    functions: Mapping[str, Function],
    budget: Budget,
    limits: Limits,
    timer: Timer,
) -> Iterator[Row]:
    """The passes of one kind, shape and dtype: they share inputs, oracle and what was compiled."""
    inputs = make_inputs(cases[0])
    suite, kind = cases[0].suite, cases[0].kind
    backward = any(case.backward for case in cases)
    gate = Gate(inputs, kind, naive(suite, kind), backward=backward)
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
    not_done: dict[str, str] = {}
    memory: dict[str, int | None] = {}
    failed = False
    for name, function in functions.items():
        is_rowmax = name == ROWMAX
        started = perf_counter()
        try:
            with warnings.catch_warnings():
                if not is_rowmax:  # torch warns of each reason why a path can't do the case
                    warnings.simplefilter("ignore", UserWarning)
                run_pass(function, inputs, backward=case.backward)
                first_call[name] = perf_counter() - started
                fault = gate.fault(function, backward=case.backward, is_peer=not is_rowmax)
            if fault is None:
                calls[name] = measured_call(function, inputs, case.step)
                memory[name] = peak_bytes(calls[name], case.suite.device)
            else:
                failed = True
        except UnsupportedError as error:
            not_done[name] = first_line(error)
            continue
        except Exception as error:
            # A candidate that can't run is a line in the report, not the end of it.
            fault = f"{type(error).__name__}: {first_line(error)}"
            failed |= is_rowmax
            if is_rowmax and case.suite.on_gpu:  # where it can't be run again to see more
                traceback.print_exc()
        if fault is not None:
            faults[name] = fault
            release_memory()
    yardstick = None
    if case.bound_by_memory and limits.copy_bytes is None:
        yardstick = inputs.to_copy()
        calls[COPY] = yardstick.clone
    timings = interleave(calls, budget, timer)
    copy = timings.pop(COPY, None)
    for name in calls.keys() - timings.keys() - {COPY}:
        faults[name] = "out of GPU memory beside the other candidates"
    rate = share = None
    if ROWMAX in timings:
        rate = _work(case, inputs) / timings[ROWMAX].median
        limit = limits.copy_bytes if case.bound_by_memory else limits.flops
        if yardstick is not None and copy is not None:
            limit = 2 * yardstick.nbytes / copy.median
        share = None if limit is None or case.suite.model else rate / limit
    flops, moved = _operations(case, inputs), _bytes(case, inputs)
    return Row(
        *(case, timings, faults, not_done, failed, first_call, rate, share, copy),
        *(memory, flops, moved),
    )


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def release_memory() -> None:
    """Gives back what a graph or an error's traceback held of the GPU's memory."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _work(case: Case, inputs: Inputs) -> int:
    """The work that the rate counts: operations, or bytes where memory is the limit."""
    if isinstance(inputs, ModelInputs):
        return inputs.tokens
    work = _bytes(case, inputs) if case.bound_by_memory else _operations(case, inputs)
    assert work is not None  # but of models, both are known
    return work


def _operations(case: Case, inputs: Inputs) -> int | None:
    if isinstance(inputs, AttentionInputs):
        return attention_flops(inputs.pairs, inputs.q.shape[-1], case.step)
    if isinstance(inputs, ModelInputs):
        return None
    return norm_flops(case.kind, case.shape, case.step)


def _bytes(case: Case, inputs: Inputs) -> int | None:
    if isinstance(inputs, AttentionInputs):
        return attention_bytes(inputs.bytes_to_move, case.step)
    if isinstance(inputs, ModelInputs):
        return None
    return norm_bytes(case.kind, case.shape, case.step, inputs.x.element_size())
