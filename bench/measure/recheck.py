"""The rounds of a case: no call is timed on values that were seen before, and some are judged.

With each round the values of the inputs change in place, with each call a few of them; now and
then their storage moves. The results of a round that nobody can foretell, and of the last one, are
judged once more: the values are put back when all candidates have returned, and only then does the
oracle see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from time import perf_counter, sleep
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conduct.arena import Arena
from ..conduct.clocks import ClockError
from ..conduct.guard import Guard
from ..options import first_line, told
from ..peers.candidates import Function, measured_call, run_pass
from .arena import CaseArena, Peek, peek
from .cases import BACKWARD, FORWARD, Case
from .gate import Gate
from .inputs import AttentionInputs, Inputs, Outputs
from .timing import Between, Rounds

# Candidates from elsewhere, by their names.
Foreign = Mapping[str, Guard]
COPY = "copy"  # the yardstick among the calls that are timed; no candidate
MOVES = 4  # the storage moves about once in so many rounds
WAIT = 0.02  # seconds that work left behind by a foreign candidate gets to show
SHARE = 0.1  # of the time of the rounds, that rechecks beyond the first and last may take


@dataclass(frozen=True)
class Kept:
    """A result of a judged round, and what was seen at once."""

    outputs: Outputs
    peeks: list[Peek]
    changed: str | None  # an input that the call changed


class Recheck(Rounds):
    """The calls of the candidates that have passed the gate."""

    def __init__(
        self,
        case: Case,
        arena: CaseArena,
        functions: Mapping[str, Function],
        make_gate: Callable[..., Gate],
        *,
        own: str,
        foreign: Foreign,
        yardstick: Tensor | None = None,
    ) -> None:
        self._case, self._inputs = case, arena
        self._functions, self._make_gate = dict(functions), make_gate
        self._own, self._foreign = own, foreign
        self._copy = None if yardstick is None else Arena({COPY: yardstick})
        self._random = Random()
        self._judged: int | None = None  # the key of the values that the round is judged on
        self._piece = 0
        self._kept: dict[str, Kept] = {}
        self._first = self._random.choice((1, 2))
        self._started, self._spent = perf_counter(), 0.0
        self._sampled: str | None = None
        self._since, self._worked = 0.0, dict.fromkeys(foreign, 0.0)
        self.faults: dict[str, str] = {}
        self.failed = False  # whether a result was found wrong
        super().__init__({})
        self._make_calls(arena.inputs)
        if self._copy is not None:
            self.calls[COPY] = self._copy.tensors[COPY].clone

    def begin(self, done: int, *, last: bool) -> None:
        arena = self._inputs.arena
        arena.renew(None, self._changing(renewed=True))
        if self._copy is not None:
            self._copy.renew()
        if self._random.randrange(MOVES) == 0 or done == self._first:
            inputs = self._inputs.moved()
            self._rebind(inputs)
            self._make_calls(inputs)
        chance = done > self._first and self._random.random() < 1 / done
        affordable = self._spent < SHARE * (perf_counter() - self._started)
        if last or done == self._first or (chance and affordable):
            self._judged, self._piece = arena.key(), arena.key()
        # whoever comes first finds in no cache what the renewal has written; in a round that is
        # judged a stranger comes before there is a result of these values that it could find
        names = sorted(self.calls, key=lambda _: self._random.random())
        if self._judged is not None:
            names.sort(key=lambda name: name not in self._foreign)
        self.calls = {name: self.calls[name] for name in names}

    def between(self, name: str) -> Between:
        self._watch(name)
        return _Between(self, name)

    def _watch(self, name: str) -> None:
        """How much a foreign candidate's threads worked in the sample of another."""
        now = perf_counter()
        for owner, guard in self._foreign.items():
            threads = guard.threads
            worked = threads.worked()
            if self._sampled not in (owner, None):
                threads.others(now - self._since, worked - self._worked.get(owner, 0.0))
            self._worked[owner] = worked
        self._sampled, self._since = name, now

    def before(self, name: str, *, last: bool) -> None:
        if name == COPY:
            assert self._copy is not None  # which makes it one of the calls
            self._copy.stir((COPY,))
            return
        arena = self._inputs.arena
        if self._judged is None or not last:
            arena.stir(self._changing())
        elif name in self._foreign and self._case.step != BACKWARD:
            # all but a few values are those of a call before it
            arena.renew(self._judged)
            self.calls[name]()
            arena.nudge(self._regions(), self._judged)
        else:
            self._put_judged()
        if hasattr(self._functions[name], "rebind"):
            self._rebind(self._inputs.inputs, name)

    def after(self, name: str) -> Callable[[Outputs], None] | None:
        if self._judged is None or name == COPY:
            return None
        return partial(self._keep, name)

    def end(self) -> None:
        if self._judged is None:
            return
        started = perf_counter()
        self._kept = {name: kept for name, kept in self._kept.items() if name in self.calls}
        if self._foreign:
            sleep(WAIT)
            if self._case.suite.on_gpu:
                torch.cuda.synchronize()
            for name in self._foreign.keys() & self._kept.keys():  # whose result must stay as it is
                self._inputs.arena.renew(None, self._changing(renewed=True))
                try:
                    self.calls[name]()
                except Exception as error:
                    self.stopped(name, error)
        self._put_judged()
        inputs = self._inputs.inputs
        results: dict[str, Outputs] = {}
        for name, kept in self._kept.items():  # all of them before there is anything right
            if (found := self._tried(name, partial(self._results, name, kept, inputs))) is not None:
                results[name] = found
        gates = [self._make_gate(inputs, pieces=[self._some_piece(inputs)])]
        if isinstance(inputs, AttentionInputs):
            some = inputs.some_rows(Random(self._piece))
            gates.append(self._make_gate(inputs, backward=False, pieces=[some]))
        for name, outputs in results.items():
            self._tried(name, partial(self._judge, name, outputs, gates, inputs))
        self._judged, self._kept = None, {}
        self._spent += perf_counter() - started

    def stopped(self, name: str, error: Exception) -> None:
        oom = isinstance(error, torch.OutOfMemoryError)
        self.calls.pop(name, None)
        if name != COPY:
            self.failed |= not oom
            out = "out of GPU memory beside the other candidates"
            self.faults[name] = out if oom else _told(error)

    # --- one candidate ----------------------------------------------------------------------------

    def _keep(self, name: str, outputs: Outputs) -> None:
        if hasattr(self._functions[name], "rebind"):  # an engine gives out the same memory again
            outputs = tuple(output.clone() for output in outputs)
        peeks = peek(outputs, self._random) if name in self._foreign else []
        self._kept[name] = Kept(outputs, peeks, self._inputs.changed())

    def _tried(self, name: str, step: Callable[[], Outputs | str | None]) -> Outputs | None:
        """The results that `step` gives; where it tells a fault, or raises an error, none."""
        try:
            found = step()
        except Exception as error:
            found = _told(error)
        if isinstance(found, str):
            self._stop(name, found)
            return None
        return found

    def _results(self, name: str, kept: Kept, inputs: Any) -> Outputs | str:
        """Those that are judged, or what is wrong whatever they are."""
        if kept.changed is not None:
            return f"it changed its input {kept.changed}"
        if any(one.changed for one in kept.peeks):
            return "its result changed after the call had returned"
        if name in self._foreign and (found := self._foreign[name].fault()) is not None:
            return found
        function, backward = self._functions[name], self._case.backward
        if name != self._own and inputs.dropout_p > 0.0:
            # its own generator drops what no oracle can tell
            return run_pass(function, replace(inputs, dropout_p=0.0), backward=backward)
        if self._case.step == BACKWARD:  # whose results are the gradients alone
            with torch.no_grad():
                return (*function(inputs), *kept.outputs)
        return kept.outputs

    def _judge(self, name: str, outputs: Outputs, gates: list[Gate], inputs: Any) -> str | None:
        """By the gate of a piece, and of attention's outputs by that of some rows of every head."""
        is_peer, backward = name != self._own, self._case.backward
        drops = inputs.dropout_p > 0.0 and not is_peer
        for gate in gates[:1] if drops else gates:
            chosen = {"backward": backward and gate is gates[0], "is_peer": is_peer, "again": True}
            some = outputs if gate is gates[0] else outputs[:1]
            if (found := gate.judge(some, self._functions[name], **chosen)) is not None:
                return found
        return None

    def _stop(self, name: str, fault: str) -> None:
        self.failed = True
        self.faults[name] = f"when called again with other values: {fault}"
        self.calls.pop(name, None)

    # --- the inputs -------------------------------------------------------------------------------

    def _changing(self, *, renewed: bool = False) -> tuple[str, ...]:
        """The tensors whose values a call depends on; `renewed` in every round."""
        if self._case.step == BACKWARD:  # what the graph holds stays: its forward has been done
            return ("d_out",)
        forward = self._case.step == FORWARD and not renewed
        return tuple(n for n in self._inputs.arena.tensors if not (forward and n == "d_out"))

    def _put_judged(self) -> None:
        """The values that all candidates of this round are judged on."""
        self._inputs.arena.renew(self._judged, self._changing(renewed=True))
        if self._case.step != BACKWARD:
            self._inputs.arena.nudge(self._regions(), self._judged)

    def _some_piece(self, inputs: Inputs) -> tuple[Any, Any]:
        return inputs.some_piece(Random(self._piece))

    def _regions(self) -> dict[str, tuple[slice, ...]]:
        inputs: Any = self._inputs.inputs
        return dict(inputs.regions(self._some_piece(inputs)[1]))

    def _make_calls(self, inputs: Inputs) -> None:
        for name, function in self._functions.items():
            self.calls.pop(name, None)  # and the graph that it may hold
            if name in self.faults:
                continue
            try:
                self.calls[name] = measured_call(function, inputs, self._case.step)
            except Exception as error:
                self.stopped(name, error)

    def _rebind(self, inputs: Inputs, *names: str) -> None:
        for name in names or self._functions:
            rebind = getattr(self._functions[name], "rebind", None)
            if rebind is not None:
                rebind(inputs)


def _told(error: Exception) -> str:
    return first_line(error) if isinstance(error, ClockError) else told(error)


class _Between(NamedTuple):
    """Of one candidate's sample."""

    rounds: Recheck
    name: str

    def before(self, *, last: bool) -> None:
        self.rounds.before(self.name, last=last)

    @property
    def after(self) -> Callable[[Any], None] | None:
        return self.rounds.after(self.name)
