"""Runs cases: inputs, gate, interleaved timing, and the comparison with the fastest peer."""

from __future__ import annotations

import functools
import gc
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...kernels.testing.memory import peak_bytes
from ..candidate import Candidate
from ..candidate.sources import Where
from ..conduct import clocks, examine
from ..conduct.guard import Guard
from ..machine.gpu import Limits
from ..options import first_line, told
from ..peers.candidates import (
    ROWMAX,
    Function,
    foreign_row,
    measured_call,
    naive,
    peers_of,
    rowmax_function,
    run_pass,
    sdpa,
)
from ..peers.packages import UnsupportedError
from . import possible
from .arena import CaseArena
from .cases import GROUP, Case, attention_bytes, attention_flops, dtype_text, norm_bytes, norm_flops
from .gate import Gate
from .inputs import AttentionInputs, Inputs, Outputs, make_inputs
from .intervals import Interval, overlap, ratio_interval
from .isolated import LostError, results
from .models import ModelInputs
from .recheck import COPY, Foreign, Recheck
from .timing import Budget, Timer, Timing, interleave, timer_for

NOT_A_MASK = ("cross", "decode", "dropout")  # what a kind says of its shape and its results


@dataclass(frozen=True)
class Row:
    """One line of the table.

    A candidate is in one of `timings`, `faults`, `not_done` and `impossible`.
    """

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
    impossible: dict[str, str] = field(default_factory=dict)  # faster than the machine can be

    @property
    def fastest_peer(self) -> str | None:
        peers = {name: t.median for name, t in self.timings.items() if name != ROWMAX}
        return min(peers, key=lambda name: peers[name]) if peers else None

    @property
    def _compared(self) -> tuple[Timing, Timing] | None:
        """The fastest peer and rowmax, where both have a timing."""
        peer, ours = self.fastest_peer, self.timings.get(ROWMAX)
        return None if peer is None or ours is None else (self.timings[peer], ours)

    @property
    def ratio(self) -> float | None:
        """Time of the fastest peer in times of rowmax: above 1, rowmax is faster."""
        pair = self._compared
        return None if pair is None else pair[0].median / pair[1].median

    @property
    def ratio_interval(self) -> Interval | None:
        """Where the ratio lies when both medians are in their 95 % intervals."""
        pair = self._compared
        return None if pair is None else ratio_interval(pair[0].interval, pair[1].interval)

    @property
    def level(self) -> bool:
        """Whether neither rowmax nor the fastest peer is faster: their intervals overlap."""
        pair = self._compared
        return pair is not None and overlap(pair[0].interval, pair[1].interval)

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
            "impossible": self.impossible,
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
    cases: Sequence[Case],
    peers: Sequence[str],
    backend: str,
    budget: Budget,
    limits: Limits,
    stranger: Where | None = None,
) -> Iterator[Row]:
    """`run_cases` of the candidates for one kind, shape and dtype.

    `stranger`: a function of someone else's, in the column of its name.
    """
    functions = candidates(cases[0], peers, backend)
    guards = {}
    if stranger is not None and computes(cases[0]) == stranger.computes:
        candidate, guards[stranger.name] = stranger_of(stranger)
        functions[stranger.name] = function_of(candidate)
    timer = timer_for(cases[0].suite.device)
    yield from run_cases(cases, functions, budget, limits, timer, guards)


@functools.cache
def stranger_of(stranger: Where) -> tuple[Candidate, Guard]:
    """The guard is there before anything of the module runs."""
    guard = Guard()
    return stranger.load(), guard


def computes(case: Case) -> str:
    """What a case is of, as candidates are: attention, or a row-wise function."""
    return "attention" if case.suite.attention else case.kind


def function_of(candidate: Candidate) -> Function:
    """From a case's inputs to its outputs."""
    if candidate.op == "attention":
        return partial(sdpa, function=candidate.attention)
    return partial(foreign_row, candidate.row, candidate.op)


def isolated_rows(
    cases: Sequence[Case],
    peers: Sequence[str],
    backend: str,
    budget: Budget,
    limits: Limits,
    seconds: float,
    stranger: Where | None = None,
) -> Iterator[Row]:
    """`rows_of` in a process of its own: where it is lost, the rest of its rows say so."""
    done = 0
    try:
        measured = (cases, peers, backend, budget, limits, stranger)
        for row in results(rows_of, *measured, seconds=seconds):
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
    foreign: Foreign | None = None,
) -> Iterator[Row]:
    """The passes of one kind, shape and dtype: they share inputs and what was compiled.

    `foreign`: candidates that are not of this project, whose conduct is examined too.
    """
    arena = CaseArena(make_inputs(cases[0]))
    for number, case in enumerate(cases):
        if number:
            arena.arena.renew()  # what was found right of the last pass is right no more
        yield _run_case(case, arena, functions, budget, limits, timer, foreign or {})
        release_memory()


@dataclass
class _Admitted:
    """What passed the gate, and why the others did not."""

    functions: dict[str, Function] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    first_call: dict[str, float] = field(default_factory=dict)
    not_done: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    failed: bool = False


def _admit(
    case: Case,
    arena: CaseArena,
    functions: Mapping[str, Function],
    make_gate: Callable[..., Gate],
    foreign: Foreign,
) -> _Admitted:
    """The gate: foreign candidates first, while there is nothing right that they could find."""
    found, gate, inputs = _Admitted(), make_gate(arena.inputs), arena.inputs
    waiting: dict[str, Outputs] = {}

    def tried(name: str, step: Callable[[Function], str | None]) -> None:
        is_rowmax = name == ROWMAX
        try:
            with warnings.catch_warnings():
                if not is_rowmax:  # torch warns of each reason why a path can't do the case
                    warnings.simplefilter("ignore", UserWarning)
                fault = step(functions[name])
            found.failed |= fault is not None
        except UnsupportedError as error:
            found.not_done[name] = first_line(error)
            return
        except Exception as error:
            # A candidate that can't run is a line in the report, not the end of it.
            fault = told(error)
            found.failed |= is_rowmax
            if is_rowmax and case.suite.on_gpu:  # where it can't be run again to see more
                traceback.print_exc()
        if fault is not None:
            found.faults[name] = fault
            waiting.pop(name, None)
            release_memory()

    def run(name: str, function: Function) -> str | None:
        started = clocks.host()
        run_pass(function, inputs, backward=case.backward)
        found.first_call[name] = clocks.host() - started
        is_peer = name != ROWMAX
        waiting[name] = gate.run(function, backward=case.backward, is_peer=is_peer)
        changed = arena.changed()
        return None if changed is None else f"it changed its input {changed}"

    def judge(name: str, function: Function) -> str | None:
        outputs, is_peer = waiting.pop(name), name != ROWMAX
        fault = gate.judge(outputs, function, backward=case.backward, is_peer=is_peer)
        if fault is None and name in foreign:
            fault = _conduct(function, case, foreign[name])
        if fault is None:
            call = measured_call(function, inputs, case.step)
            found.memory[name] = peak_bytes(call, case.suite.device)
            found.functions[name] = function
        return fault

    ours = [name for name in functions if name not in foreign]
    for group in ([name for name in functions if name in foreign], *([name] for name in ours)):
        for name in group:
            tried(name, partial(run, name))
        for name in tuple(waiting):
            tried(name, partial(judge, name))
    found.functions = {name: f for name, f in functions.items() if name in found.functions}
    return found


def _conduct(function: Function, case: Case, guard: Guard) -> str | None:
    """What examination finds."""
    kind, heads, head_size = case.kind, (1, 1), 1
    if case.suite.attention:
        sizes = case.sizes
        heads = sizes.heads, (sizes.heads // GROUP if "gqa" in case.parts else sizes.key_heads)
        head_size = sizes.head_size
        kind = "+".join(part for part in kind.split("+") if part not in NOT_A_MASK) or "full"
    asked = kind, *heads, head_size, case.dtype, case.backward
    if asked not in guard.examined:
        subject = examine.Subject(
            function,
            kind=kind,
            heads=heads,
            head_size=head_size,
            dtype=case.dtype,
            backward=case.backward,
            device=case.suite.device,
            guard=guard,
        )
        guard.examined[asked] = examine.fault_of(subject)
        if subject.refused:
            checks = f"{len(subject.refused)} of {len(examine.CHECKS)} checks"
            warnings.warn(
                f"a function of yours refused {checks}, the first: {subject.refused[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
    return guard.examined[asked]


def _run_case(
    case: Case,
    arena: CaseArena,
    functions: Mapping[str, Function],
    budget: Budget,
    limits: Limits,
    timer: Timer,
    foreign: Foreign,
) -> Row:
    """Gate first, then time what passed."""

    def make_gate(inputs: Inputs, **chosen: Any) -> Gate:
        unfused = naive(case.suite, case.kind)
        return Gate(inputs, case.kind, unfused, **{"backward": case.backward, **chosen})

    guards = {name: foreign[name] for name in foreign if name in functions}
    admitted = _admit(case, arena, functions, make_gate, guards)
    faults, inputs = admitted.faults, arena.inputs
    yardstick = None
    if case.bound_by_memory and limits.copy_bytes is None:
        yardstick = inputs.to_copy().clone()  # whose values change as the inputs' do
    rounds = Recheck(
        *(case, arena, admitted.functions, make_gate),
        own=ROWMAX,
        foreign={name: g for name, g in guards.items() if name in admitted.functions},
        yardstick=yardstick,
    )
    timings = interleave(rounds, budget, timer)
    faults |= rounds.faults
    failed = admitted.failed or rounds.failed
    copy = timings.pop(COPY, None)
    flops, moved = _operations(case, inputs), _bytes(case, inputs)
    impossible = possible.too_fast(case, timings, flops, moved, limits)
    timings = {name: timing for name, timing in timings.items() if name not in impossible}
    rate = share = None
    if ROWMAX in timings:
        rate = _work(case, inputs) / timings[ROWMAX].median
        limit = limits.copy_bytes if case.bound_by_memory else limits.flops
        if yardstick is not None and copy is not None:
            limit = 2 * yardstick.nbytes / copy.median
        share = None if limit is None or case.suite.model else rate / limit
    failed |= bool(impossible)
    return Row(
        *(case, timings, faults, admitted.not_done, failed, admitted.first_call, rate, share, copy),
        *(admitted.memory, flops, moved),
        impossible=impossible,
    )


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
