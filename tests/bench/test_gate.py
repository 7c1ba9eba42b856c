"""The gate: right kernels pass, wrong ones do not, whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rowmax import kernels
from rowmax.bench.cases import DROPOUT_P, FORWARD, FORWARD_BACKWARD, SUITES, Case
from rowmax.bench.gate import Gate, compare
from rowmax.bench.inputs import SEED, AttentionInputs, NormInputs, Outputs, make_inputs
from rowmax.bench.machine import Limits
from rowmax.bench.peers import PEERS, naive_attention, naive_norm, run_pass, subject
from rowmax.bench.runner import run_case
from rowmax.bench.timing import Budget

SHAPES = {"cpu-attention": (3, 2, 24, 8), "cpu-norms": (16, 24)}
KINDS = [(suite.name, kind) for suite in SUITES.values() for kind in suite.kinds]


def gate_of(kind: str, suite: str = "cpu-attention") -> Gate:
    case = Case(suite, kind, SHAPES[suite], FORWARD_BACKWARD)
    return Gate(case, make_inputs(case))


@pytest.mark.parametrize("suite, kind", KINDS)
def test_the_reference_passes(suite: str, kind: str) -> None:
    """With dropout too: the gate knows which weights the seed drops."""
    function = subject(suite, kind, "reference")
    assert gate_of(kind, suite).fault(function, is_subject=True) is None


@pytest.mark.parametrize("suite, kind", KINDS)
def test_torchs_eager_paths_pass(suite: str, kind: str) -> None:
    gate = gate_of(kind, suite)
    for name, make in PEERS[suite].items():
        if name != "compile":
            assert gate.fault(make(kind), is_subject=False) is None, name


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


BROKEN = [
    no_mask,
    mask_off_by_one,
    no_scale,
    wrong_gradient_only,
    half_precision,
    last_row_missing,
    not_a_number,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_kernel_is_rejected(broken: Callable[[AttentionInputs], Outputs]) -> None:
    for is_subject in (True, False):
        fault = gate_of("padded").fault(broken, is_subject=is_subject)
        assert fault is not None
        assert "largest error" in fault


def test_a_wrong_dropout_is_rejected() -> None:
    """Another seed, another probability, or the wrong scale: none is what was asked for."""
    gate = gate_of("dropout")

    def with_dropout(dropout_p: float, seed: int, scale: float) -> Callable[..., Outputs]:
        return lambda inputs: (
            kernels.attention(
                *(inputs.q, inputs.k, inputs.v),
                dropout_p=dropout_p,
                seed=seed,
                backend="reference",
            )
            * scale,
        )

    assert gate.fault(with_dropout(DROPOUT_P, SEED, 1.0), is_subject=True) is None
    for wrong in [(DROPOUT_P, SEED + 1, 1.0), (0.11, SEED, 1.0), (DROPOUT_P, SEED, 0.9)]:
        assert gate.fault(with_dropout(*wrong), is_subject=True) is not None, wrong


@pytest.mark.parametrize("kind", SUITES["cpu-norms"].kinds)
def test_a_broken_norm_is_rejected(kind: str) -> None:
    def broken(inputs: NormInputs) -> Outputs:
        return tuple(1.001 * output for output in naive_norm(kind, inputs))

    assert gate_of(kind, "cpu-norms").fault(broken, is_subject=False) is not None


def test_rowmax_is_held_to_more_than_its_peers() -> None:
    """A kernel a few roundings worse than it should be."""

    def inexact(inputs: AttentionInputs) -> Outputs:
        return (naive_attention(inputs)[0] * (1 + 5e-6),)

    gate = gate_of("plain")
    assert gate.fault(inexact, is_subject=True) is not None
    assert gate.fault(inexact, is_subject=False) is None


def test_missing_results_are_rejected() -> None:
    def one_result(inputs: NormInputs) -> Outputs:
        return naive_norm("add_layer_norm", inputs)[:1]

    fault = gate_of("add_layer_norm", "cpu-norms").fault(one_result, is_subject=False)
    assert fault == "expected 6 results, got 5"


def test_compare_names_the_shape() -> None:
    fault = compare(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4), 2.0)
    assert fault == "expected shape (2, 4), got (2, 3)"


def test_no_time_is_reported_for_a_broken_kernel() -> None:
    case = Case("cpu-attention", "padded", SHAPES["cpu-attention"], FORWARD)

    def raises(inputs: AttentionInputs) -> Outputs:
        raise RuntimeError("out of luck\nsecond line")

    functions = {"rowmax": no_mask, "naive": naive_attention, "raises": raises}
    row = run_case(case, functions, Budget(0.0, 2, 2), Limits(1, 1e9, {}))
    assert set(row.timings) == {"naive"}
    assert "largest error" in row.faults["rowmax"]
    assert row.faults["raises"] == "RuntimeError: out of luck"
    assert row.ratio is row.rate is row.share is None


def test_run_pass_gives_the_gradient_of_every_leaf() -> None:
    inputs = gate_of("plain").inputs
    out, *gradients = run_pass(naive_attention, inputs, backward=True)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in inputs.leaves]
    assert run_pass(naive_attention, inputs, backward=False)[0].requires_grad is False
    assert out.requires_grad
