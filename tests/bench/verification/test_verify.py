"""`verify`, as a function and as a command: what it finds, says, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowmax import kernels
from rowmax.bench import verify
from rowmax.bench.verification import high_precision, suite
from rowmax.bench.verification.outcome import SCHEMA
from rowmax.bench.verification.text import WIDTH
from rowmax.kernels.testing.cases import KINDS, SHAPES
from rowmax.kernels.testing.oracle import AttentionCase
from rowmax.kernels.testing.suite import ALL_KINDS, OPS

FEW: dict[str, Any] = {"kinds": ["causal", "key-lengths", "bias"], "dtypes": ["float32"]}
ONE_SHAPE = [(2, 4, 2, 9, 9, 8, 8)]


def sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, **options)


def test_torchs_sdpa_is_right_but_reads_padding() -> None:
    accuracy = verify(sdpa, checks=["accuracy"], shapes=ONE_SHAPE, **FEW)
    assert accuracy.passed, accuracy.failures
    report = verify(sdpa, kinds=["poisoned-padding"], dtypes=["float32"], checks=["accuracy"])
    assert not report.passed
    assert "NaN or infinity where the oracle is finite" in report.failures[0]


def test_a_callable_that_is_wrong_is_found_out() -> None:
    def unscaled(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return sdpa(query, key, value, **{**options, "scale": 1.0})

    def backwards(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return sdpa(query, key, value.detach() + 0.999 * (value - value.detach()), **options)

    def bfloat16(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        mask = options.pop("attn_mask")
        if mask is not None and mask.is_floating_point():
            mask = mask.bfloat16()
        halves = (tensor.bfloat16() for tensor in (query, key, value))
        return sdpa(*halves, attn_mask=mask, **options).float()

    for function, tensor in ((unscaled, "out"), (backwards, "d_v"), (bfloat16, "out")):
        report = verify(function, checks=["accuracy"], shapes=ONE_SHAPE, **FEW)
        assert not report.passed
        assert all(f": {tensor}: " in failure for failure in report.failures), function


@pytest.mark.parametrize("given, returned", [("bfloat16", "float32"), ("float32", "float64")])
def test_another_dtype_than_the_inputs_is_refused(given: str, returned: str) -> None:
    """However exact: what comes after it would run in that dtype."""

    def wide(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return sdpa(query, key, value, **options).to(getattr(torch, returned))

    report = verify(
        wide, kinds=["none", "causal"], dtypes=[given], checks=["accuracy"], shapes=ONE_SHAPE
    )
    assert len(report.failures) == len(report.findings[0].runs) > 0
    for failure in report.failures:
        assert failure.endswith(f"out: torch.{returned}, expected torch.{given}")


def test_dropout_of_a_callable() -> None:
    def twice(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        dropout_p = options.pop("dropout_p", 0.0)
        return sdpa(query, key, value, dropout_p=dropout_p, **options) / (1 - dropout_p)

    def too_few(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        dropout_p = options.pop("dropout_p", 0.0)
        kept = sdpa(query, key, value, dropout_p=dropout_p / 2, **options)
        return kept * (1 - dropout_p / 2) / (1 - dropout_p)

    def found(function: Any) -> str | None:
        report = verify(function, checks=["invariants"], dtypes=["float32"])
        (one,) = [x for x in report.findings[0].invariants if x.name == "dropout scales"]
        return one.fault

    assert found(sdpa) is None
    assert "1 / (1 - p)" in str(found(twice))
    assert "% of the weights drop" in str(found(too_few))


def test_a_callable_that_raises_fails_the_case_and_not_the_run() -> None:
    def picky(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if options["is_causal"]:
            raise NotImplementedError("no causal masks\nat all")
        return sdpa(query, key, value, **options)

    report = verify(picky, checks=["accuracy"], shapes=ONE_SHAPE, **FEW)
    (failure,) = report.failures
    assert failure.endswith("NotImplementedError: no causal masks")


@pytest.mark.parametrize("check", ["accuracy", "invariants"])
def test_the_reference_passes(check: str) -> None:
    report = verify(backends=["reference"], dtypes=["float32"], checks=[check], quick=True)
    assert report.passed, report.failures
    text = str(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "reference" in text


def test_determinism_alone_is_asked_for_of_every_function() -> None:
    again = {"same bits again", "any thread count", "alone as in a batch"}
    report = verify(backends=["reference"], dtypes=["float32"], checks=["determinism"])
    assert report.passed, report.failures
    found: dict[str, set[str]] = {}
    for one in report.findings[0].invariants:
        found.setdefault(one.op, set()).add(one.name)
    assert found.pop("linear_cross_entropy") == {"same bits again"}
    assert set(found) == set(OPS) - {"linear_cross_entropy"}
    assert all(names == again for names in found.values())


@pytest.mark.parametrize("fault", ["same bits again", "any thread count", "alone as in a batch"])
def test_packed_sequences_that_depend_on_what_they_must_not(fault: str) -> None:
    calls = 0

    def packed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> Tensor:
        nonlocal calls
        calls += 1
        depends = {
            "same bits again": calls,
            "any thread count": torch.get_num_threads(),
            "alone as in a batch": len(cu_seqlens_q),
        }
        out = kernels.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, backend="reference")
        return out * (1 + 1e-3 * depends[fault])

    report = verify(packed, ops=["attention_varlen"], dtypes=["float32"], checks=["determinism"])
    broken = {one.name for one in report.findings[0].invariants if one.fault is not None}
    assert fault in broken
    assert broken == {fault} or fault == "same bits again"


def test_numba_passes_what_is_quick_in_float32() -> None:
    report = verify(
        backends=["numba"],
        ops=["attention", "masked_softmax", "rms_norm"],
        dtypes=["float32"],
        checks=["accuracy", "invariants"],
        quick=True,
    )
    assert report.passed, report.failures
    ratios = [run.ratio for run in report.findings[0].runs]
    assert max(ratios) > 0.5  # a ratio that nothing could raise would be no measure


def test_a_broken_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function, as a user's kernels would come."""
    real = kernels.rms_norm

    def off(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, **rest: Any) -> Tensor:
        return real(x, weight, eps * 1.5, **rest)

    monkeypatch.setattr(kernels, "rms_norm", off)
    report = verify(
        backends=["reference"], ops=["rms_norm"], dtypes=["float32"], checks=["accuracy"]
    )
    assert not report.passed


def test_every_kind_has_cases_and_every_shape_a_reason() -> None:
    cases = suite.cases_of(suite.Settings(), torch.float32)
    kinds = {case.kind for case in cases}
    assert kinds >= set(ALL_KINDS)
    assert len({str(case) for case in cases}) == len(cases)
    of_attention = [case for case in cases if case.op == "attention" and case.kind in KINDS]
    assert {case.shape for case in of_attention} == {tuple(shape) for shape in SHAPES}


def test_the_oracle_is_right_and_a_wrong_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in high_precision.check(("rms_norm", "layer_norm")))
    kinds = {"none": high_precision.ATTENTION["none"]}
    monkeypatch.setattr(high_precision, "ATTENTION", kinds)
    (right,) = high_precision.check(("attention",))
    assert right.passed
    assert right.error > 0  # it was compared with more digits than it has

    oracle = AttentionCase.oracle

    def wrong(case: AttentionCase) -> Any:
        results = oracle(case)
        return {**results, "d_k": results["d_k"] * (1 + 1e-9)}

    monkeypatch.setattr(AttentionCase, "oracle", wrong)
    (found,) = high_precision.check(("attention",))
    assert not found.passed
    assert found.worst == "d_k"


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"function": 3}, TypeError, "function: expected a callable, got int"),
        ({"ops": ["atention"]}, ValueError, "ops: expected names of"),
        ({"kinds": ["odd"]}, ValueError, "got 'odd'"),
        ({"dtypes": ["int8"]}, ValueError, "dtypes: expected names of"),
        ({"backends": ["cuda"]}, ValueError, "backends: expected names of"),
        ({"contract": "torch"}, ValueError, "contract: backends have rowmax's, got 'torch'"),
        ({"function": len, "contract": "mine"}, ValueError, "contract: expected names of"),
        ({"shapes": [(1, 2, 3)]}, ValueError, "shapes: expected 7 ints"),
        ({"shapes": [(1, 3, 2, 4, 4, 8, 8)]}, ValueError, "Hq a multiple of Hkv"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        verify(**arguments)


# --- the command ----------------------------------------------------------------------------------

NARROW = ["verify", "--backend", "reference", "--dtype", "float32", "--op", "rms_norm"]


def test_the_command(tmp_path: Path, shown: Any) -> None:
    written = tmp_path / "verify.json"
    page = tmp_path / "verify.html"
    files = ["--json", str(written), "--html", str(page)]
    output = shown(*NARROW, "--verbose", *files)
    assert max(map(len, output.splitlines())) <= WIDTH
    assert "rms_norm weight (7,5) float32" in output
    assert "rejected: " in output
    document = json.loads(written.read_text("utf-8"))
    assert document["schema"] == SCHEMA
    assert document["passed"]
    (implementation,) = document["implementations"]
    assert implementation["name"] == "reference"
    result = implementation["cases"][0]["results"][0]
    assert set(result) >= {"largest_error", "relative_rms_error", "largest_ulps", "ratio"}
    elements = sum(sum(one["counts"]) for one in implementation["ulp_histograms"])
    assert elements > 1000
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_finding_is_exit_status_1(shown: Any) -> None:
    chosen = ["--function", "torch.nn.functional:scaled_dot_product_attention"]
    chosen += ["--kind", "poisoned-padding", "--dtype", "float32", "--check", "accuracy"]
    assert "FAILED: 1 findings" in shown("verify", *chosen, status=1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--backend", "cuda"], "--backend: expected names of native"),
        (["--op", "attend"], "--op: expected names of attention"),
        (["--kind", "odd"], "--kind: expected names of none"),
        (["--dtype", "int8"], "--dtype: expected names of float64"),
        (["--check", "speed"], "--check: expected names of oracle"),
        (["--shape", "1,2,3"], "--shape: expected seven positive whole numbers"),
        (["--shape", "1,3,2,4,4,8,8"], "Hq a multiple of Hkv"),
        (["--contract", "torch"], "--contract: only with --function"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--function", "torch"], "--function: expected MODULE:NAME, FILE.py[:NAME]"),
        (["--function", "torch:no_such_function"], "--function: expected a callable"),
        (["--function", "torch:float32"], "a dtype"),
        (["--function", "torch:add", "--op", "linear_cross_entropy"], "is attention, got"),
        (["--layout", "blhd"], "--layout: only with --function"),
        (["--forward-only"], "--forward-only: only with --function"),
        (["--function", "torch:add", "--device", "nowhere"], "--device: nowhere does not work"),
        (["--json", "/nonexistent-folder/x.json"], "--json: can't write /nonexistent-folder"),
        (["--html", "/nonexistent-folder/x.html"], "--html: can't write /nonexistent-folder"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, refused: Any) -> None:
    assert words in refused("verify", *arguments)
