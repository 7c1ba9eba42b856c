"""What `speed` does between the calls that it times, and whom it finds out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch

from rowmax.bench.conduct.guard import Guard
from rowmax.bench.machine.host import CpuLimits
from rowmax.bench.measure.arena import CaseArena, peek
from rowmax.bench.measure.cases import BACKWARD, FORWARD, FORWARD_BACKWARD, PASSES, SUITES, Case
from rowmax.bench.measure.inputs import AttentionInputs, NormInputs, Outputs, make_inputs
from rowmax.bench.measure.models import ModelInputs
from rowmax.bench.measure.possible import too_fast
from rowmax.bench.measure.runner import Row, run_cases
from rowmax.bench.measure.timing import Budget, HostTimer, Timing, summarise
from rowmax.bench.peers.candidates import naive_attention, naive_norm, rowmax_function

ATTENTION, NORMS, MODEL = SUITES["cpu-attention"], SUITES["cpu-norms"], SUITES["model"]
FAST = CpuLimits(1, 1e15, 1e15)


def case_of(
    kind: str = "full", step: str = FORWARD, shape: tuple[int, ...] = (3, 2, 24, 8)
) -> Case:
    return Case(ATTENTION, torch.float32, kind, shape, step)


def rows_of(
    functions: dict[str, Callable[..., Outputs]],
    *cases: Case,
    foreign: bool = True,
    rounds: int = 6,
    limits: CpuLimits = FAST,
) -> list[Row]:
    guards = {name: Guard() for name in functions if foreign and name == "yours"}
    budget = Budget(0.0, rounds, rounds)
    return list(run_cases(cases, functions, budget, limits, HostTimer(), guards))


class Watched:
    """The naive path, and what it is called with."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.addresses: list[int] = []

    def __call__(self, inputs: Any) -> Outputs:
        x = inputs.q if isinstance(inputs, AttentionInputs) else inputs.x
        self.values.append(x.detach().clone())
        self.addresses.append(x.data_ptr())
        if isinstance(inputs, NormInputs):
            return naive_norm("layer_norm", inputs)
        return naive_attention(inputs)


@pytest.mark.parametrize("step", [FORWARD, FORWARD_BACKWARD])
def test_no_call_is_timed_on_values_that_it_has_seen(step: str) -> None:
    watched = Watched()
    (row,) = rows_of({"rowmax": watched}, case_of(step=step), rounds=30)
    assert row.faults == {}
    rounds = watched.values[-30:]
    assert all(not torch.equal(a, b) for a, b in pairwise(rounds))
    assert len(set(watched.addresses)) > 2


def test_of_norms_too() -> None:
    watched = Watched()
    case = Case(NORMS, torch.float32, "layer_norm", (16, 24), FORWARD_BACKWARD)
    (row,) = rows_of({"rowmax": watched}, case, rounds=10)
    assert row.faults == {}
    assert len({tuple(x.flatten().tolist()) for x in watched.values[-10:]}) == 10


def stale_when_timed() -> Callable[..., Outputs]:
    """Right while it is admitted, which takes a few calls; then the same result for ever."""
    kept: list[Outputs] = []

    def function(inputs: AttentionInputs) -> Outputs:
        if len(kept) < 4:
            kept.append(naive_attention(inputs))
        return kept[-1]

    return function


@pytest.mark.parametrize("name", ["rowmax", "sdpa", "yours"])
def test_a_result_that_is_kept_is_found_out_whoever_keeps_it(name: str) -> None:
    functions = {"rowmax": naive_attention, name: stale_when_timed()}
    (row,) = rows_of(functions, case_of(), foreign=False)
    assert "when called again with other values: " in row.faults[name]
    assert row.failed
    assert name not in row.timings
    assert row.ratio is None


def test_a_row_that_is_wrong_in_one_head_of_many_is_found_out() -> None:
    """Neither of the first nor of the last batch element, which the gate judges in large cases."""

    def inside(inputs: AttentionInputs) -> Outputs:
        out = naive_attention(inputs)[0].clone()
        out[1, 1] *= 1.1
        return (out,)

    functions = {"rowmax": naive_attention, "inside": inside}
    large = case_of(shape=(4, 4, 160, 8))
    assert 4 * 4 * 160 * 160 > 2**18  # or else the gate looks at all of it
    (row,) = rows_of(functions, large, rounds=2)
    assert "when called again" in row.faults["inside"]
    assert "rowmax" in row.timings


def changes_late(name: str) -> Callable[..., Outputs]:
    """An input, once the gate has seen that it changes none."""
    calls = [0]

    def function(inputs: AttentionInputs) -> Outputs:
        calls[0] += 1
        out = naive_attention(inputs)
        if calls[0] > 4:
            with torch.no_grad():
                getattr(inputs, name)[0, 0, 0, 0] += 1
        return out

    return function


@pytest.mark.parametrize("name", ["q", "v", "d_out"])
def test_an_input_that_is_changed_later(name: str) -> None:
    functions = {"rowmax": naive_attention, "sdpa": changes_late(name)}
    (row,) = rows_of(functions, case_of())
    assert row.faults["sdpa"].endswith(f"it changed its input {name}")


def test_an_error_of_a_later_call_is_its_own_fault() -> None:
    calls = [0]

    def tired(inputs: AttentionInputs) -> Outputs:
        calls[0] += 1
        if calls[0] > 6:
            raise RuntimeError("too tired\nto go on")
        return naive_attention(inputs)

    (row,) = rows_of({"rowmax": naive_attention, "sdpa": tired}, case_of())
    assert row.faults == {"sdpa": "RuntimeError: too tired"}
    assert set(row.timings) == {"rowmax"}


def test_a_mask_that_is_changed_at_once() -> None:
    def function(inputs: AttentionInputs) -> Outputs:
        out = naive_attention(inputs)
        assert inputs.allowed is not None
        inputs.allowed.fill_(True)
        return out

    (row,) = rows_of({"rowmax": naive_attention, "sdpa": function}, case_of("padded"))
    assert row.faults == {"sdpa": "it changed its input allowed"}


def test_honest_candidates_of_every_pass() -> None:
    """Dropout too, where peers drop others than the oracle does."""
    right = rowmax_function(ATTENTION, "padded+dropout", "reference")
    functions = {"rowmax": right, "naive": naive_attention}
    for kind in ("full", "padded+bias", "padded+dropout"):
        rows = rows_of(functions, *(case_of(kind, step) for step in PASSES), rounds=3)
        assert [row.faults for row in rows] == [{}, {}, {}]
        assert all(set(row.timings) == {"rowmax", "naive"} for row in rows)


def test_a_kept_gradient_of_the_backward_alone() -> None:
    """The graph stays from call to call, the gradient that arrives does not."""
    kept: list[Outputs] = []

    class Stale(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, out: torch.Tensor) -> torch.Tensor:
            return out.clone()

        @staticmethod
        def backward(_ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            if len(kept) < 3:
                kept.append((grads[0].clone(),))
            return kept[-1][0]

    def stale(inputs: AttentionInputs) -> Outputs:
        return (Stale.apply(naive_attention(inputs)[0]),)

    (row,) = rows_of({"rowmax": naive_attention, "sdpa": stale}, case_of(step=BACKWARD))
    assert "when called again with other values: result 1 of 4" in row.faults["sdpa"]
    assert set(row.timings) == {"rowmax"}


def test_models_are_rechecked() -> None:
    case = Case(MODEL, torch.float32, "encoder", (2, 12, 64), FORWARD_BACKWARD)
    right = rowmax_function(MODEL, "encoder", "reference")
    kept: list[Outputs] = []

    def stale(inputs: ModelInputs) -> Outputs:
        out = right(inputs)[0]
        if len(kept) < 4:
            kept.append((out.detach(),))
        return (kept[-1][0] + out - out.detach(),)

    (row,) = rows_of({"rowmax": right, "stale": stale}, case, rounds=2)
    assert "rowmax" in row.timings
    assert "when called again" in row.faults["stale"]


# --- what a candidate leaves ----------------------------------------------------------------------


def test_a_peek_sees_what_is_written_later() -> None:
    out = torch.zeros(100)
    (seen,) = peek((out,), Random(1))
    assert not seen.changed
    out.fill_(1.0)
    assert seen.changed


def test_an_arena_of_a_case_keeps_its_masks() -> None:
    arena = CaseArena(make_inputs(case_of("padded+bias")), seed=1)
    before: Any = arena.inputs
    moved: Any = arena.moved()
    assert moved.q is not before.q
    assert moved.bias is before.bias
    assert moved.allowed is before.allowed
    assert arena.changed() is None


# --- faster than can be ---------------------------------------------------------------------------


def timing(seconds: float) -> Timing:
    return summarise([seconds] * 3)


def test_what_is_faster_than_the_machine_is_impossible() -> None:
    """1 GFLOP of work on a machine of 100 GFLOP/s and of 10 GB/s."""
    limits = CpuLimits(1, 1e11, 1e10)
    timings = {"slow": timing(20e-3), "cached": timing(2e-6), "level": timing(9e-3)}
    found = too_fast(case_of(), timings, 10**9, 10**6, limits)
    assert set(found) == {"cached"}
    assert found["cached"] == "5e+05 GFLOP/s, and this machine does 100"


def test_a_backward_pass_may_keep_the_weights() -> None:
    limits = CpuLimits(1, 1e11, 1e10)
    timings = {"unfused": timing(8e-3)}
    assert too_fast(case_of(), timings, 10**9, 10**6, limits)
    assert not too_fast(case_of(step=FORWARD_BACKWARD), timings, 10**9, 10**6, limits)


def test_bytes_count_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowmax.bench.machine.host.copy_rate", lambda _size: 1e10)
    norm = Case(NORMS, torch.float32, "rms_norm", (4096, 512), FORWARD)
    limits = CpuLimits(1, 1e11, 1e9)
    timings = {"right": timing(1e-3), "cached": timing(1e-6)}
    assert set(too_fast(norm, timings, 10**9, 10**7, limits)) == {"cached"}


def test_the_impossible_is_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is printed as that, and the others are compared without it."""
    text = "9 GFLOP/s, and this machine does 1"
    monkeypatch.setattr("rowmax.bench.measure.possible.too_fast", lambda *_: {"sdpa": text})
    functions = {"rowmax": naive_attention, "sdpa": naive_attention, "naive": naive_attention}
    (row,) = rows_of(functions, case_of())
    assert set(row.timings) == {"rowmax", "naive"}
    assert row.fastest_peer == "naive"
    assert row.failed
    assert row.as_json()["impossible"] == {"sdpa": text}
