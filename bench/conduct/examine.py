"""How a candidate behaves when it is called again: on tensors that it knows, and on unusual ones.

Each check is one that some false speedup fails: a result kept from an earlier call, work that goes
on after the call, a short cut for what a benchmark always has. They are small, and are judged by
the gate's rule for peers: whether it is the same computation, not how exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from time import sleep
from typing import Any

import torch
from torch import Tensor

from ..candidate.interface import OPS
from ..measure.arena import CaseArena, peek
from ..measure.cases import FORWARD, FORWARD_BACKWARD, SUITES, Case, Shape, Suite
from ..measure.gate import Gate
from ..measure.inputs import Inputs, Outputs, make_inputs
from ..options import told
from ..peers.candidates import Function, naive, run_pass
from .guard import Guard

WAIT = 0.02  # seconds that work left behind gets to show
ODD, LONG = 83, 4099  # no multiple of anything; beyond 4096
JUDGED = 10  # of the calls with other values, beside the last one
LARGE = 40.0  # times the queries: scores in the hundreds


@dataclass
class Subject:
    """A candidate and what it is asked for."""

    function: Function  # from inputs to outputs
    kind: str = "full"  # of attention, or the name of a row-wise function
    heads: tuple[int, int] = (4, 4)  # of queries, of keys
    head_size: int = 16
    dtype: torch.dtype = torch.float32
    backward: bool = True
    device: str = "cpu"
    calls: int = 150  # on the same tensors, with other values each
    random: Random = field(default_factory=Random)
    guard: Guard = field(default_factory=Guard)  # from before its first call
    refused: list[str] = field(default_factory=list)  # checks that it raised an error in

    @property
    def suite(self) -> Suite:
        name = "cpu-norms" if self.kind in OPS else "cpu-attention"
        return replace(SUITES[name], device=self.device)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Those that are put to the test."""
        return ("q", "k", "v") if self.suite.attention else ("x",)

    def arena(self, queries: int, keys: int, *, masked: bool = True, batch: int = 3) -> Trial:
        """Of attention without its mask where it is not `masked`; of rows, as many in each."""
        if not self.suite.attention:
            return Trial(self, self.kind, (batch * queries, keys))
        shape = (batch, *self.heads, queries, keys, self.head_size)
        return Trial(self, self.kind if masked else "full", shape)


class Trial:
    """The candidate on the tensors of one small case."""

    def __init__(self, subject: Subject, kind: str, shape: Shape) -> None:
        step = FORWARD_BACKWARD if subject.backward else FORWARD
        inputs = make_inputs(Case(subject.suite, subject.dtype, kind, shape, step))
        self._subject, self._kind = subject, kind
        self.whole = CaseArena(replace(inputs, dropout_p=0.0))
        self.arena = self.whole.arena

    @property
    def inputs(self) -> Inputs:
        return self.whole.inputs

    def call(self) -> Outputs:
        return run_pass(self._subject.function, self.inputs, backward=self._subject.backward)

    def fault(self, outputs: Outputs) -> str | None:
        """What is wrong with them, for the values that the tensors hold now."""
        subject = self._subject
        judge = Gate(
            self.inputs, self._kind, naive(subject.suite, self._kind), backward=subject.backward
        )
        return judge.judge(
            outputs, subject.function, backward=subject.backward, is_peer=True, again=True
        )

    def judged(self) -> str | None:
        return self.fault(self.call())

    def fill(self, values: dict[str, Callable[[Tensor], Tensor]]) -> None:
        with torch.no_grad():
            for name, change in values.items():
                tensor = self.arena.tensors[name]
                tensor.copy_(change(tensor))


# --- the same tensors again -----------------------------------------------------------------------


def other_values(subject: Subject) -> str | None:
    """Many calls with other values in place; some are judged, which nobody can foretell.

    Finds a result that is kept by address, identity or shape, and what is right at first only.
    """
    trial = subject.arena(40, 40)
    judged = {subject.random.randrange(1, subject.calls) for _ in range(JUDGED)}
    for at in range(subject.calls):
        outputs = trial.call()
        is_judged = at in judged or at == subject.calls - 1
        found = trial.fault(outputs) if is_judged else None
        if found is not None:
            return f"call {at + 1}: {found}"
        trial.arena.renew()
    return None


def few_values(subject: Subject) -> str | None:
    """All but a few values of one tensor are those of the last call."""
    for name in subject.tensors:
        trial = subject.arena(40, 40)
        for _ in range(2):
            trial.call()
        trial.arena.nudge({name: trial.inputs.regions(None)[name]})
        if (found := trial.judged()) is not None:
            return f"{name} changed in a few places: {found}"
    return None


def moved_storage(subject: Subject) -> str | None:
    """Other tensors of the same shape, and again the first address with other values."""
    trial = subject.arena(40, 40)
    for _ in range(3):
        trial.call()
        trial.arena.move()
        trial.arena.renew()
    return trial.judged()


def inputs_kept(subject: Subject) -> str | None:
    trial = subject.arena(40, 40)
    for _ in range(3):
        trial.arena.renew()
        trial.call()
        if (changed := trial.whole.changed()) is not None:
            return f"it changed its input {changed}"
    return None


def results_kept(subject: Subject) -> str | None:
    """A result is the caller's: later calls leave it as it is, and it is no part of an input."""
    trial = subject.arena(40, 40)
    kept, copies = [], []
    for _ in range(3):
        trial.arena.renew()
        outputs = trial.call()
        kept.append(outputs)
        copies.append([output.detach().clone() for output in outputs])
    taken = {_address(tensor) for tensor in trial.arena.tensors.values()}
    for outputs, before in zip(kept, copies, strict=True):
        for output, copy in zip(outputs, before, strict=True):
            if not torch.equal(output.detach().nan_to_num(), copy.nan_to_num()):
                return "a later call changed the result of an earlier one"
        addresses = set(map(_address, outputs))
        if addresses & taken:
            return "a result lies in the memory of an input, or of another call's result"
        taken |= addresses
    return None


def done_at_return(subject: Subject) -> str | None:
    """What is read at once, and again a while later, is the same; and threads left behind rest."""
    for _ in range(2):
        trial = subject.arena(128, 128)
        trial.arena.renew()
        outputs = trial.call()
        seen = peek(outputs, subject.random)
        sleep(WAIT)
        if subject.device != "cpu":
            torch.cuda.synchronize()
        if any(one.changed for one in seen):
            return "its result changed after the call had returned"
        if (found := trial.fault(outputs)) is not None:
            return found
    return subject.guard.threads.fault()


def nothing_replaced(subject: Subject) -> str | None:
    """Clocks, torch, the judge and settings are as before the call, and no thread works."""
    subject.arena(40, 40).call()
    return subject.guard.fault()


# --- unusual tensors ------------------------------------------------------------------------------


def odd_length(subject: Subject) -> str | None:
    """Every element of every head, at a length that no tile divides."""
    return subject.arena(ODD, ODD).judged()


def many_keys(subject: Subject) -> str | None:
    return subject.arena(3, LONG, masked=False, batch=1).judged()


def zeros(subject: Subject) -> str | None:
    """Of all queries or keys: each weight is the same, and no short cut is right."""
    for name in subject.tensors[:2]:
        trial = subject.arena(ODD, ODD)
        trial.fill({name: torch.zeros_like})
        if (found := trial.judged()) is not None:
            return f"{name} of zeros: {found}"
    return None


def signed_zeros(subject: Subject) -> str | None:
    """A tenth of all values is 0.0 or -0.0, which is the same number."""
    generator = torch.Generator().manual_seed(subject.random.getrandbits(40))

    def some(tensor: Tensor) -> Tensor:
        chosen = torch.rand(tensor.shape, generator=generator) < 0.1
        return tensor.where(~chosen.to(tensor.device), tensor * 0.0)

    trial = subject.arena(ODD, ODD)
    trial.fill(dict.fromkeys(subject.tensors, some))
    return trial.judged()


def large_scores(subject: Subject) -> str | None:
    """In the hundreds: exp of them overflows where the row's maximum is not taken off."""
    trial = subject.arena(ODD, ODD)
    trial.fill({subject.tensors[0]: partial(torch.mul, LARGE)})
    return trial.judged()


Check = Callable[[Subject], str | None]
CHECKS: dict[str, Check] = {
    "nothing replaced": nothing_replaced,
    "other values in place": other_values,
    "a few other values": few_values,
    "storage moved": moved_storage,
    "inputs unchanged": inputs_kept,
    "results are the caller's": results_kept,
    "done when it returns": done_at_return,
    "odd length": odd_length,
    "past 4096 keys": many_keys,
    "zeros": zeros,
    "signed zeros": signed_zeros,
    "large scores": large_scores,
}


def fault_of(subject: Subject) -> str | None:
    """The first finding. A shape that the candidate refuses by an error is no finding: `speed` asks
    for shapes beside those that it times.
    """
    for name, check in CHECKS.items():
        try:
            found = check(subject)
        except Exception as error:
            subject.refused.append(f"{name} ({told(error)})")
            continue
        if found is not None:
            return f"{name}: {found}"
    return None


def _address(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())
