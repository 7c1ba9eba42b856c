"""The gate: right kernels pass, wrong ones do not, whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rowmax import kernels
from rowmax.bench.machine.host import CpuLimits
from rowmax.bench.measure import inputs as bench_inputs
from rowmax.bench.measure.cases import (
    BACKWARD,
    DROPOUT_P,
    FORWARD,
    FORWARD_BACKWARD,
    PASSES,
    SUITES,
    Case,
    Suite,
)
from rowmax.bench.measure.gate import Gate, fault_of
from rowmax.bench.measure.inputs import (
    SEED,
    AttentionInputs,
    Inputs,
    NormInputs,
    Outputs,
    make_inputs,
)
from rowmax.bench.measure.runner import Row, run_cases
from rowmax.bench.measure.timing import Budget, HostTimer
from rowmax.bench.peers.candidates import (
    PACKAGES,
    SLOW_TO_START,
    measured_call,
    naive,
    naive_attention,
    naive_norm,
    peers_of,
    rowmax_function,
    run_pass,
    unfused,
)
from rowmax.bench.peers.packages import UnsupportedError
from rowmax.kernels.backends import dispatch
from rowmax.kernels.testing.tolerance import Expected

ATTENTION, NORMS = SUITES["cpu-attention"], SUITES["cpu-norms"]
# The GPU's kinds and peers too, on tensors that are here.
HERE = [
    *(ATTENTION, NORMS),
    *(
        replace(SUITES[name], device="cpu", dtypes=(dtype,), name=f"{name}-{dtype}")
        for name in ("gpu-attention", "gpu-norms")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
]
KINDS = [
    pytest.param(suite, kind, id=f"{suite.name}-{kind}")
    for suite in HERE
    for kind in (*suite.kinds, *(("padded+bias+dropout",) if suite is ATTENTION else ()))
]
# Kinds whose queries are not as many as their keys; key heads are shared by four.
UNEVEN = {
    "cross": (3, 2, 20, 30, 8),
    "decode": (3, 8, 2, 1, 30, 8),
    "padded+bias+dropout": (3, 8, 2, 5, 30, 8),
}
HALF = replace(ATTENTION, dtypes=(torch.bfloat16,))


def case_of(kind: str, suite: Suite, step: str = FORWARD_BACKWARD) -> Case:
    heads = 16 if kind == "gqa" else 2
    shape: tuple[int, ...] = (3, heads, 24, 8) if suite.attention else (16, 24)
    if kind in UNEVEN:
        shape = UNEVEN[kind]
    return Case(suite, suite.dtypes[0], kind, shape, step)


def inputs_of(kind: str, suite: Suite = ATTENTION) -> Inputs:
    return make_inputs(case_of(kind, suite))


class Judge:
    """The gate of a small case."""

    def __init__(self, kind: str, suite: Suite = ATTENTION) -> None:
        self.gate = Gate(inputs_of(kind, suite), kind, naive(suite, kind), backward=True)

    def fault(self, function: Callable[..., Outputs], *, is_peer: bool) -> str | None:
        return self.gate.fault(function, backward=True, is_peer=is_peer)


@pytest.mark.parametrize("suite, kind", KINDS)
@pytest.mark.parametrize("most_scores", [bench_inputs.MAX_SCORES, 0], ids=["whole", "by_head"])
def test_the_reference_passes(
    suite: Suite, kind: str, most_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout too: the gate knows which weights the seed drops."""
    monkeypatch.setattr(bench_inputs, "MAX_SCORES", most_scores)
    function = rowmax_function(suite, kind, "reference")
    gate = Judge(kind, suite).gate
    for backward in (False, True):
        assert gate.fault(function, backward=backward, is_peer=False) is None


@pytest.mark.parametrize("suite, kind", KINDS)
def test_torchs_eager_paths_pass(suite: Suite, kind: str) -> None:
    gate = Judge(kind, suite)
    for name, make in peers_of(suite).items():
        if name in (*SLOW_TO_START, *PACKAGES, "sdpa-flash", "sdpa-efficient", "sdpa-cudnn"):
            continue  # tested by themselves, or on a GPU only
        assert gate.fault(make(kind), is_peer=True) is None, name


def no_mask(inputs: AttentionInputs) -> Outputs:
    return naive_attention(replace(inputs, allowed=None))


def mask_off_by_one(inputs: AttentionInputs) -> Outputs:
    assert inputs.allowed is not None
    allowed = inputs.allowed.roll(1, -1)
    allowed[..., 0] = True
    return naive_attention(replace(inputs, allowed=allowed))


def no_scale(inputs: AttentionInputs) -> Outputs:
    return naive_attention(replace(inputs, q=inputs.q * inputs.q.shape[-1] ** 0.5))


def wrong_gradient_only(inputs: AttentionInputs) -> Outputs:
    k = inputs.k.detach() + 0.999 * (inputs.k - inputs.k.detach())
    return naive_attention(replace(inputs, k=k))


def half_precision(inputs: AttentionInputs) -> Outputs:
    q, k, v = (leaf.bfloat16() for leaf in inputs.leaves)
    return (naive_attention(replace(inputs, q=q, k=k, v=v))[0].float(),)


def last_row_missing(inputs: AttentionInputs) -> Outputs:
    out = naive_attention(inputs)[0].clone()
    out[-1, :, -1] = 0.0
    return (out,)


def not_a_number(inputs: AttentionInputs) -> Outputs:
    out = naive_attention(inputs)[0].clone()
    out[0, 0, 0, 0] = torch.nan
    return (out,)


def only_one_head_right(inputs: AttentionInputs) -> Outputs:
    out = naive_attention(inputs)[0]
    return (torch.cat((out[:, :1], 1.5 * out[:, 1:]), dim=1),)


BROKEN = [
    *(no_mask, mask_off_by_one, no_scale, wrong_gradient_only, half_precision),
    *(last_row_missing, not_a_number, only_one_head_right),
]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("most_scores", [bench_inputs.MAX_SCORES, 0], ids=["whole", "by_head"])
@pytest.mark.parametrize("suite", [ATTENTION, HALF], ids=["float32", "bfloat16"])
def test_a_broken_kernel_is_rejected(
    suite: Suite,
    broken: Callable[[AttentionInputs], Outputs],
    most_scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if suite is HALF and broken in (half_precision, wrong_gradient_only):
        return  # no more wrong than the type itself
    monkeypatch.setattr(bench_inputs, "MAX_SCORES", most_scores)
    for is_peer in (False, True):
        fault = Judge("padded", suite).fault(broken, is_peer=is_peer)
        assert fault is not None
        assert ("NaN" if broken is not_a_number else "largest error") in fault


def test_a_wrong_dropout_is_rejected() -> None:
    """Another seed, another probability, or the wrong scale: none is what was asked for."""
    gate = Judge("dropout")

    def with_dropout(dropout_p: float, seed: int, scale: float) -> Callable[..., Outputs]:
        return lambda inputs: (
            kernels.attention(
                *(inputs.q, inputs.k, inputs.v), dropout_p=dropout_p, seed=seed, backend="reference"
            )
            * scale,
        )

    assert gate.fault(with_dropout(DROPOUT_P, SEED, 1.0), is_peer=False) is None
    for wrong in [(DROPOUT_P, SEED + 1, 1.0), (0.11, SEED, 1.0), (DROPOUT_P, SEED, 0.9)]:
        assert gate.fault(with_dropout(*wrong), is_peer=False) is not None, wrong


@pytest.mark.parametrize("kind", NORMS.kinds)
def test_a_broken_norm_is_rejected(kind: str) -> None:
    def broken(inputs: NormInputs) -> Outputs:
        return tuple(1.001 * output for output in naive_norm(kind, inputs))

    assert Judge(kind, NORMS).fault(broken, is_peer=True) is not None


def test_rowmax_is_held_to_more_than_its_peers() -> None:
    """A kernel a few roundings worse than it should be."""

    def inexact(inputs: AttentionInputs) -> Outputs:
        return (naive_attention(inputs)[0] * (1 + 5e-6),)

    gate = Judge("full")
    assert gate.fault(inexact, is_peer=False) is not None
    assert gate.fault(inexact, is_peer=True) is None


def test_in_half_precision_rowmax_is_not_excused_by_scores_in_half() -> None:
    """The path that rounds every score is right for a peer, and no measure of a kernel."""
    inputs = inputs_of("full", HALF)
    assert isinstance(inputs, AttentionInputs)
    inputs = replace(inputs, q=(8 * inputs.q).detach().requires_grad_())  # scores up to 30
    gate = Gate(inputs, "full", naive_attention, backward=True)
    assert gate.fault(naive_attention, backward=True, is_peer=True) is None
    right = rowmax_function(HALF, "full", "reference")
    assert gate.fault(right, backward=True, is_peer=False) is None
    fault = gate.fault(naive_attention, backward=True, is_peer=False)
    assert fault is not None
    assert "largest error" in fault


def test_missing_results_are_rejected() -> None:
    def one_result(inputs: NormInputs) -> Outputs:
        return naive_norm("add_layer_norm", inputs)[:1]

    fault = Judge("add_layer_norm", NORMS).fault(one_result, is_peer=True)
    assert fault == "expected 6 results, got 5"


def expected_zeros(dtype: torch.dtype, *size: int) -> Expected:
    exact = torch.zeros(*size, dtype=torch.float64)
    return Expected(exact, exact.to(dtype), exact)


def test_another_dtype_is_named() -> None:
    """However exact: rowmax gives what it was given; a peer may be wider."""
    expected = expected_zeros(torch.bfloat16, 2)
    fault = fault_of(torch.zeros(2), expected, is_peer=False)
    assert fault == "torch.float32, expected torch.bfloat16"
    assert fault_of(torch.zeros(2), expected, is_peer=True) is None


def test_another_shape_is_named() -> None:
    fault = fault_of(torch.zeros(2, 3), expected_zeros(torch.float32, 2, 4), is_peer=False)
    assert fault == "shape (2, 3), expected (2, 4)"


def rows_of(functions: dict[str, Callable[..., Outputs]], *cases: Case) -> list[Row]:
    limits = CpuLimits(1, 1e15, 1e15)
    return list(run_cases(cases, functions, Budget(0.0, 2, 2), limits, HostTimer()))


def raises(inputs: AttentionInputs) -> Outputs:
    raise RuntimeError("out of luck\nsecond line")


def test_no_time_is_reported_for_a_broken_kernel() -> None:
    functions = {"rowmax": no_mask, "naive": naive_attention, "raises": raises}
    (row,) = rows_of(functions, case_of("padded", ATTENTION, FORWARD))
    assert set(row.timings) == {"naive"}
    assert "largest error" in row.faults["rowmax"]
    assert row.faults["raises"] == "RuntimeError: out of luck"
    assert row.ratio is row.rate is row.share is None
    assert row.failed


def test_a_peer_that_cannot_do_a_case_is_no_failure() -> None:
    """But rowmax is, and so is a peer that computes something else."""
    case = case_of("padded", ATTENTION, FORWARD)
    (row,) = rows_of({"rowmax": naive_attention, "raises": raises}, case)
    assert (row.failed, set(row.faults)) == (False, {"raises"})
    (row,) = rows_of({"rowmax": raises, "naive": naive_attention}, case)
    assert row.failed
    (row,) = rows_of({"rowmax": naive_attention, "wrong": no_mask}, case)
    assert row.failed


def test_auto_is_no_time_of_the_unfused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no fused backend does the case, that is what the line says, and no failure."""
    case = case_of("full", ATTENTION, FORWARD)
    functions = {"rowmax": rowmax_function(ATTENTION, "full", "auto"), "naive": naive_attention}
    (row,) = rows_of(functions, case)
    assert set(row.timings) == {"rowmax", "naive"}

    def declines(_problem: object) -> str:
        return "there is a full moon"

    for backend in ("numba", "native"):
        monkeypatch.setattr(dispatch.load(backend), "declines", declines)
    # which answers before a backend is asked whether it declines
    monkeypatch.setattr(dispatch, "fast_path_attention", lambda _name: None)
    functions["rowmax"] = rowmax_function(ATTENTION, "full", "auto")
    (row,) = rows_of(functions, case)
    assert set(row.timings) == {"naive"}
    assert row.not_done["rowmax"].startswith("native: there is a full moon; numba: ")
    assert (row.faults, row.failed, row.ratio) == ({}, False, None)


def test_an_error_of_a_fused_backend_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr("rowmax.bench.peers.candidates.kernels.attention", fails)
    functions = {"rowmax": rowmax_function(ATTENTION, "full", "auto")}
    (row,) = rows_of(functions, case_of("full", ATTENTION, FORWARD))
    assert row.faults == {"rowmax": "RuntimeError: illegal instruction"}
    assert row.failed


def test_scores_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 heads of 2 batch elements, 24 x 24 scores of 4 bytes: three matrices, five backward."""
    inputs = inputs_of("full")
    matrix = 3 * 2 * 24 * 24 * 4
    function = unfused(naive_attention)
    for backward, matrices in ((False, 3), (True, 5)):
        monkeypatch.setattr(
            "rowmax.bench.peers.candidates.free_memory", lambda m=matrices: m * matrix
        )
        assert len(run_pass(function, inputs, backward=backward)) == (4 if backward else 1)
        monkeypatch.setattr(
            "rowmax.bench.peers.candidates.free_memory", lambda m=matrices: m * matrix - 1
        )
        with pytest.raises(UnsupportedError, match="GiB are free"):
            run_pass(function, inputs, backward=backward)


def test_passes_share_their_inputs() -> None:
    rows = rows_of(
        {"rowmax": naive_attention}, *(case_of("causal", ATTENTION, step) for step in PASSES)
    )
    assert [row.case.step for row in rows] == list(PASSES)
    assert all(not row.faults and row.rate for row in rows)


def test_run_pass_gives_the_gradient_of_every_leaf() -> None:
    inputs = inputs_of("full")
    out, *gradients = run_pass(naive_attention, inputs, backward=True)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in inputs.leaves]
    assert run_pass(naive_attention, inputs, backward=False)[0].requires_grad is False
    assert out.requires_grad


def test_the_backward_alone_runs_again_and_again() -> None:
    inputs = inputs_of("full")
    expected = run_pass(naive_attention, inputs, backward=True)[1:]
    call = measured_call(naive_attention, inputs, BACKWARD)
    for _ in range(3):
        for gradient, right in zip(call(), expected, strict=True):
            assert torch.equal(gradient, right)
    assert len(measured_call(naive_attention, inputs, FORWARD_BACKWARD)()) == 4
    assert len(measured_call(naive_attention, inputs, FORWARD)()) == 1
