"""Whatever interface a stranger's kernel has, `verify` and `speed` judge it: right, and wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowmax.bench import cli, speed, verify
from rowmax.bench.candidate import Candidate, sources
from rowmax.bench.measure.cases import SUITES, Case
from rowmax.bench.measure.inputs import make_inputs
from rowmax.bench.options import UsageError
from rowmax.kernels import Dense

pytestmark = pytest.mark.usefixtures("known_limits")

FILE = Path(__file__).parent / "strangers.py"
FORWARD: dict[str, Any] = {"backward": False}
BY_FILE: dict[str, dict[str, Any]] = {
    "attention_with_few_options": {},
    "flash_like": {"layout": "blhd"},
    "flash_varlen_like": {},
    "into_out": FORWARD,
    "custom_attention": FORWARD,
    "numba_rms_norm": FORWARD,
    "triton_softmax": FORWARD,
    "layernorm": {},
}


@pytest.fixture
def strangers() -> Any:
    return sources.module_of("--function", str(FILE))


def by_verify(where: Any, **options: Any) -> Any:
    few: dict[str, Any] = {"dtypes": ["float32"], "checks": ["accuracy", "invariants"]}
    return verify(where, quick=True, contract="torch", **{**few, **options})


def by_speed(where: Any, **options: Any) -> Any:
    op = Candidate(where).op if callable(where) else sources.Where(where).computes
    shape = (3, 4, 40, 16) if op == "attention" else (64, 48)
    few: dict[str, Any] = {"shapes": [shape], "peers": ["naive"], "seconds": 0.02}
    return speed(where, backend="reference", **{**few, **options}).rows


def judge(where: Any, strangers: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Accepted by both as it is, and rejected by both when it is a hundredth off."""
    report = by_verify(where, **options)
    assert report.passed, report.failures
    assert report.findings[0].done > 0
    rows = by_speed(where, **options)
    assert not any("yours" in row.faults for row in rows), [row.faults for row in rows]
    timed = [row for row in rows if "yours" not in row.not_done]
    assert all("yours" in row.timings for row in timed)
    assert timed
    monkeypatch.setattr(strangers, "FACTOR", 1.01)
    assert not by_verify(where, checks=["accuracy"], **options).passed
    for row in by_speed(where, **options)[: len(timed)]:
        assert "error" in row.faults["yours"]


@pytest.mark.parametrize("name", BY_FILE)
def test_a_function_of_a_file(name: str, strangers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(f"{FILE}:{name}", strangers, monkeypatch, **BY_FILE[name])


def test_a_torch_custom_op(strangers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judge("rowmax_strangers::attention", strangers, monkeypatch, **FORWARD)
    with pytest.raises(UsageError, match="no op no_such::op; --import the module"):
        verify("no_such::op")


def test_an_attention_of_transformers(strangers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("transformers.modeling_utils")
    utils.AttentionInterface.register("strangers", strangers.for_transformers)
    judge("attn_implementation:strangers", strangers, monkeypatch)
    with pytest.raises(
        UsageError, match="expected an attention that transformers knows, of .*sdpa"
    ):
        verify("attn_implementation:no_such")


def test_a_module_by_its_name(
    tmp_path: Path, strangers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_strangers.py").write_text(
        FILE.read_text("utf-8").replace("_strangers::", "_again::")
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = sources.module_of("--function", "my_strangers")
    judge("my_strangers:attention_with_few_options", module, monkeypatch)


def test_a_package_of_kernels_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hugging Face's project lays it out: build/VARIANT with metadata.json and __init__.py."""
    folder = tmp_path / "my-norm"
    build = folder / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (folder / "build" / "torch211-cxx11-cu999-x86_64-linux").mkdir()
    metadata: dict[str, Any] = {
        "id": "_my_norm_cpu_1",
        "name": "my-norm",
        "version": 1,
        "license": "Apache-2.0",
    }
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (build / "metadata.json").write_text(json.dumps(metadata))
    (build / "inner.py").write_text(
        "import torch.nn.functional as F\nFACTOR = 1.0\n"
        "def rms_norm(x, weight, eps):\n"
        "    return F.rms_norm(x, x.shape[-1:], weight, eps) * FACTOR\n"
    )
    (build / "__init__.py").write_text("from .inner import rms_norm\n__all__ = ['rms_norm']\n")
    sources.module_of("--function", str(folder))
    (inner,) = (
        m for n, m in sys.modules.items() if n.startswith("my_norm_") and n.endswith(".inner")
    )
    judge(str(folder) + ":rms_norm", inner, monkeypatch)
    assert sources.load(str(folder)).op == "rms_norm"  # the only function
    (build / "__init__.py").rename(build / "gone.py")
    build.rename(folder / "build" / "torch-metal")
    with pytest.raises(
        UsageError, match="expected build/VARIANT, VARIANT one of .*; got torch-metal"
    ):
        sources.load(str(folder))


# --- what the adapter does ------------------------------------------------------------------------


def test_what_has_sdpas_signature_is_called_itself() -> None:
    def mine(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return query

    for function in (mine, F.scaled_dot_product_attention, lambda q, k, v, **options: q):
        assert Candidate(function).attention is function


def test_what_an_interface_lacks_is_declined_and_told() -> None:
    report = verify(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        name="bare",
        kinds=["none", "causal", "scale"],
        dtypes=["float32"],
        checks=["accuracy"],
        quick=True,
    )
    reasons = {run.case.kind: run.declined for run in report.findings[0].runs if run.declined}
    assert reasons["causal"] == "its interface has no mask"
    assert reasons["scale"] == "its interface has no scale"
    assert report.passed
    assert "its interface has no mask" in str(report)


@pytest.mark.parametrize(
    "name, op",
    [
        ("my.module:FusedRMSNorm", "rms_norm"),
        ("LayerNormFn", "layer_norm"),
        ("my.norms:LayerNormFn.apply", "layer_norm"),
        ("test_of_a_softmax.<locals>.mine", "attention"),
        ("masked_softmax", "masked_softmax"),
        ("flash_attn_func", "attention"),
        ("fused_add_layer_norm", "add_layer_norm"),
        ("norms/layer_norm.py:attend", "attention"),
    ],
)
def test_the_name_tells_the_op(name: str, op: str) -> None:
    assert Candidate(lambda *tensors, **options: tensors[0], name).op == op


def needs_more(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    return q


def two_tensors(q: Tensor, k: Tensor) -> Tensor:
    return q


@pytest.mark.parametrize(
    "function, options, words",
    [
        (needs_more, {}, "its parameter block has no default, and is none of"),
        (two_tensors, {}, "expected 3 tensors among its parameters, got \\(q, k\\)"),
        (two_tensors, {"op": "dance"}, "op: expected one of attention, layer_norm"),
        (two_tensors, {"layout": "hbld"}, "layout: expected one of bhld, blhd, packed, got 'hbld'"),
        (F.scaled_dot_product_attention, {"layout": "packed"}, "it has no cu_seqlens_q"),
        (3, {}, "function: expected a callable, got int"),
    ],
)
def test_what_can_not_be_called_is_refused(
    function: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        Candidate(function, **options)


def test_packed_sequences_of_lengths() -> None:
    """A mask that hides keys at the end is what packing leaves out; another is declined."""
    packed = sources.load(f"{FILE}:flash_varlen_like")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 7, 8, generator=generator) for _ in range(3))
    real = (torch.arange(7) < torch.tensor([[7], [3], [5]])).view(3, 1, 1, 7)
    expected = F.scaled_dot_product_attention(q, k, v, real)
    torch.testing.assert_close(packed.attention(q, k, v, real), expected)
    for mask in (real.flip(-1), torch.zeros(1, 1, 7, 7)):
        with pytest.raises(Exception, match="packed sequences have no mask but lengths"):
            packed.attention(q, k, v, mask)
    starts = torch.arange(0, 22, 7)
    one, two, three = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))
    with pytest.raises(Exception, match="no Dense of packed sequences"):
        packed.varlen(one, two, three, starts, starts, mask=Dense(real[0, 0]))


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_the_layout_is_that_of_memory(layout: str) -> None:
    """Whoever wants (B, L, H, D) gets it without a copy."""
    case = Case(SUITES["cpu-attention"], torch.float32, "full", (2, 3, 5, 8), "forward", layout)
    inputs: Any = make_inputs(case)
    assert inputs.q.shape == (2, 3, 5, 8)
    assert inputs.q.transpose(1, 2).is_contiguous() == (layout == "blhd")
    assert inputs.d_out.stride() == inputs.q.stride()


def test_a_softmax_of_strangers_may_give_nan_where_nothing_is_allowed() -> None:
    def softmax(scores: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        scores = scores * scale
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)

    report = by_verify(softmax, checks=["accuracy"])
    assert report.passed, report.failures
    assert any("masked_softmax key-lengths" in text for text in report.not_promised)


# --- the commands ---------------------------------------------------------------------------------


def test_the_commands_take_every_option(tmp_path: Path) -> None:
    written = tmp_path / "out.json"
    common = ["--dtype", "float32", "--json", str(written)]
    timed = ["speed", *common, "--backend", "reference", "--seconds", "0.02", "--pass", "forward"]

    where = f"{FILE}:flash_like"
    shape = ["--shape", "2,2,24,16", "--kind", "full", "--peers", "naive"]
    assert cli.main([*timed, "--function", where, "--layout", "blhd", *shape]) == 0
    document = json.loads(written.read_text("utf-8"))
    assert document["settings"]["layout"] == "blhd"
    assert where in document["rows"][0]["seconds"]

    where = "rowmax_strangers::attention"
    chosen = ["--function", where, "--import", str(FILE), "--forward-only"]
    assert cli.main([*timed, *chosen, *shape]) == 0
    document = json.loads(written.read_text("utf-8"))
    assert document["settings"]["layout"] == "bhld"
    assert where in document["rows"][0]["seconds"]
    checks = ["--check", "accuracy", "--kind", "none,causal", "--quick", "--contract", "torch"]
    assert cli.main(["verify", *chosen, *common, *checks]) == 0
    (one,) = json.loads(written.read_text("utf-8"))["implementations"]
    tensors = {result["tensor"] for case in one["cases"] for result in case["results"]}
    assert tensors == {"out"}

    where = f"{FILE}:layernorm"  # which is timed at nothing but layer norms
    assert cli.main([*timed, "--function", where, "--shape", "32,16", "--peers", "torch"]) == 0
    rows = json.loads(written.read_text("utf-8"))["rows"]
    assert [row["kind"] for row in rows] == ["layer_norm"]
    assert where in rows[0]["seconds"]


def test_an_op_that_the_name_does_not_tell(refused: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch.nn.functional as F\n"
        "def fused(x, weight=None, eps=1e-6):\n"
        "    return F.rms_norm(x, x.shape[-1:], weight, eps)\n"
    )
    assert "expected 3 tensors among its parameters" in refused("verify", "--function", str(file))
    accuracy = ["--check", "accuracy", "--dtype", "float32", "--quick", "--contract", "torch"]
    assert cli.main(["verify", "--function", str(file), "--op", "rms_norm", *accuracy]) == 0
