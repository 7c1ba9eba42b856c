"""`python -m rowmax.bench speed`: a tiny run, its table and JSON, and every wrong call."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rowmax.bench import cli
from rowmax.bench.measure.cases import SUITES
from rowmax.bench.measure.report import WIDTH, header_lines
from rowmax.bench.peers.candidates import ONLY_BY_NAME

from ..processes import python

pytestmark = pytest.mark.usefixtures("small_machine")

TINY = ["speed", "--seconds", "0.01", "--quick", "--backend", "reference"]
ON_CPU = ["--suite", "cpu-attention,cpu-norms"]


def test_a_tiny_run(tmp_path: Path, shown: Any) -> None:
    path = tmp_path / "speed.json"
    shapes = ["--shape", "2,2,9,4", "--shape", "16,8"]
    output = shown(*TINY, *ON_CPU, *shapes, "--json", str(path))
    assert max(len(line) for line in output.splitlines()) <= WIDTH
    for word in ("cpu-attention", "cpu-norms", "(2,2,9,4)", "math: sdpa-math", "geometric means"):
        assert word in output

    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["schema"] == 3
    assert len(document["rows"]) == 8 * 2 * 2 + 4 * 2
    assert document["limits"]["float32_fma_flops_per_s"] > 0
    assert document["machine"]["torch_threads"] >= 1
    for row in document["rows"]:
        assert row["faults"] == {}
        assert "compile" not in row["seconds"]
        assert row["ratio"] == pytest.approx(
            row["seconds"][row["fastest_peer"]]["median"] / row["seconds"]["rowmax"]["median"]
        )
        assert row["fastest_peer"] == min(
            (name for name in row["seconds"] if name != "rowmax"),
            key=lambda name: row["seconds"][name]["median"],
        )


def test_the_selection(shown: Any) -> None:
    chosen = ["--shape", "1,1,4,4", "--kind", "causal", "--pass", "forward", "--peers", "sdpa"]
    lines = shown(*TINY, *ON_CPU, *chosen, "--dtype", "float32").splitlines()
    (row,) = [line for line in lines if line[1:].startswith("(1,1,4,4)")]
    assert " fwd " in row
    assert "causal (GFLOP/s; limit: float32 FMA from registers)" in lines


def test_one_shape_with_its_mask_dtype_and_dropout(tmp_path: Path, shown: Any) -> None:
    """In a combination of no suite's; a cache of grouped heads; and what memory holds up."""
    path = tmp_path / "speed.json"
    chosen = ["--shape", "2,8/2,5,30,4", "--shape", "2,8/2,1,30,4", "--dtype", "float16"]
    kinds = ["--kind", "padded+bias+dropout,decode", "--pass", "forward", "--json", str(path)]
    output = shown(*TINY, "--suite", "cpu-attention", *chosen, *kinds)
    assert "cpu-attention, float16" in output
    assert "decode (GB/s; limit: x.clone(), timed in turns with it)" in output
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    found = [(row["kind"], row["shape"], row["limit"], row["copy_seconds"] is None) for row in rows]
    uneven, few = [2, 8, 2, 5, 30, 4], [2, 8, 2, 1, 30, 4]
    assert found == [
        ("padded+bias+dropout", uneven, "arithmetic", True),
        ("padded+bias+dropout", few, "arithmetic", True),
        ("decode", uneven, "copy", False),
        ("decode", few, "copy", False),
    ]
    for row in rows:
        assert row["faults"] == {}
        assert "copy" not in row["seconds"]
        moved = 2 * 4 * 2 * (2 * 8 * row["shape"][3] + 2 * 2 * 30)  # q and out, k and v
        if row["limit"] == "copy":
            rate = moved / row["seconds"]["rowmax"]["median"]
            assert row["rowmax_rate_per_s"] == pytest.approx(rate)
            copied = 2 * (2 * 2 * 2 * 30 * 4 * 2)  # k and v, read and written
            assert row["share_of_limit"] == pytest.approx(rate * row["copy_seconds"] / copied)


STRANGERS = """
import torch.nn.functional as F

kept = {}

def honest(query, key, value, **options):
    return F.scaled_dot_product_attention(query, key, value, **options)

def cached(query, key, value, **options):
    address = query.data_ptr()
    if address not in kept:
        kept[address] = honest(query, key, value, **options)
    return kept[address]
"""


@pytest.mark.parametrize("name", ["honest", "cached"])
def test_a_strangers_function_has_a_column_if_it_is_honest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "strangers.py").write_text(STRANGERS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    path, function = tmp_path / "speed.json", f"strangers:{name}"
    chosen = ["--shape", "3,2,40,8", "--kind", "causal", "--pass", "forward", "--peers", "sdpa"]
    asked = ["--function", function, "--json", str(path)]
    status = cli.main([*TINY, "--suite", "cpu-attention", "--dtype", "float32", *chosen, *asked])
    output = capsys.readouterr().out
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert f" {name} ratio" in output
    assert status == (name == "cached")
    assert (function in row["seconds"]) == (name == "honest")
    if name == "cached":
        assert "not timed: other values in place: " in output
        assert set(row["faults"]) == {function}


def test_an_impossible_time_is_printed_and_fails(
    monkeypatch: pytest.MonkeyPatch, shown: Any
) -> None:
    text = "9 GFLOP/s, and this machine does 1"
    monkeypatch.setattr("rowmax.bench.measure.possible.too_fast", lambda *_: {"sdpa": text})
    chosen = ["--shape", "1,1,4,4", "--kind", "causal", "--pass", "forward", "--peers", "sdpa"]
    output = shown(*TINY, "--suite", "cpu-attention", *chosen, "--dtype", "float32", status=1)
    (row,) = [line for line in output.splitlines() if line[1:].startswith("(1,1,4,4)")]
    assert " impossible " in row
    assert f"sdpa impossible: {text}" in output
    assert "1 timings are impossible here, and not ranked: see above" in output


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a compiler"
)
def test_torch_compile_is_a_peer(shown: Any) -> None:
    """Traced and run; what the compiler makes of it is torch's business."""
    chosen = ["--shape", "16,8", "--kind", "rms_norm", "--pass", "forward", "--peers", "compile"]
    lines = shown(*TINY, *ON_CPU, *chosen).splitlines()
    (row,) = [line for line in lines if line[1:].startswith("(16,8)")]
    assert "fault" not in row


def test_peers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    monkeypatch.setattr("rowmax.bench.peers.candidates.find_spec", lambda _: None)
    words = '--peers: not installed here: onnxruntime, openvino; pip install "rowmax[peers]" brings'
    assert words in refused(
        "speed", "--suite", "cpu-attention", "--peers", "sdpa,onnxruntime,openvino"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "cpu-atention"], "--suite: expected names of cpu-attention, cpu-norms"),
        (["--function", "no_such_module:f"], "--function: can't import no_such_module:f"),
        (["--function", "torch:add", "--suite", "cpu-norms"], "--function: attention is not among"),
        (["--function", "no_file.py:f"], "--function: expected a file that is there"),
        (["--op", "rms_norm"], "--op: only with --function"),
        (["--peers", "xform"], "--peers: expected names of sdpa, sdpa-math"),
        (["--suite", "cpu-norms", "--peers", "sdpa"], "--peers: expected names of torch, naive"),
        (["--kind", "full,odd"], "got 'odd'"),
        (["--pass", "sideways"], "--pass: expected names of forward, forward+backward, backward"),
        (["--dtype", "int8"], "--dtype: expected names of float32, bfloat16, float16; got 'int8'"),
        (["--stop-after", "0"], "--stop-after: expected a positive number"),
        (["--shape", "8"], "--shape: expected cpu-attention: batch,heads,length,head size"),
        (["--suite", "cpu-norms", "--shape", "8,8,512,64"], "cpu-norms: rows,columns"),
        (["--shape", "8,8/3,1,9,4"], "--shape: expected heads that 3 divides, got 8,8/3,1,9,4"),
        (["--kind", "causal+odd"], "got 'causal+odd'"),
        (["--suite", "cpu-norms", "--kind", "causal+padded"], "got 'causal+padded'"),
        (["--shape", "8,x"], "--shape: expected positive whole numbers"),
        (["--shape", "8,0"], "--shape: expected positive whole numbers"),
        (["--backend", "cuda"], "--backend: expected one of auto, "),
        (["--seconds", "0"], "--seconds: expected a positive number"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--json", "/nonexistent-folder/x.json"], "--json: can't write /nonexistent-folder"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, refused: Any) -> None:
    assert words in refused("speed", *arguments)


def test_a_kernel_that_fails_the_gate_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, shown: Any
) -> None:
    monkeypatch.setattr(
        "rowmax.bench.peers.candidates.kernels.rms_norm", lambda x, *_arguments, **_options: x
    )
    chosen = ["--shape", "16,8", "--kind", "rms_norm", "--pass", "forward", "--peers", "torch"]
    output = shown(*TINY, *ON_CPU, *chosen, status=1)
    assert "rowmax not timed: result 0 of 1: largest error" in output
    assert "1 timings are missing" in output


@pytest.mark.parametrize("suite", ["cpu-attention", "cpu-norms"])
def test_the_header_fits(suite: str) -> None:
    """With every peer that there is, and the widest shape."""
    suite_ = SUITES[suite]
    for dtype in suite_.dtypes:
        usual = [name for name in suite_.peers if name not in ONLY_BY_NAME]
        lines = header_lines(suite_, dtype, usual)
        assert max(map(len, lines)) <= WIDTH


def test_other_dtypes_and_the_backward_alone(tmp_path: Path, shown: Any) -> None:
    path = tmp_path / "speed.json"
    chosen = ["--shape", "1,2,12,8", "--shape", "16,8", "--dtype", "bfloat16", "--json", str(path)]
    passes = ["--pass", "backward,forward+backward", "--kind", "causal,layer_norm"]
    assert " bwd " in shown(*TINY, *ON_CPU, *chosen, *passes)
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["pass"] for row in rows] == ["forward+backward", "backward"] * 2
    for row in rows:
        assert row["dtype"] == "bfloat16"
        assert row["faults"] == {}
        assert row["rowmax_rate_per_s"] > 0


def test_the_gpus_suites_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: Any
) -> None:
    """Every kind and pass; what a peer can't do is a line, and no failure."""
    names = ("gpu-attention", "gpu-norms")
    here = {name: replace(SUITES[name], device="cpu") for name in names}
    monkeypatch.setattr(cli, "SUITES", here)
    path = tmp_path / "speed.json"
    shapes = ["--shape", "2,8,20,16", "--shape", "16,24"]
    output = shown(*TINY, *shapes, "--json", str(path))
    assert "sdpa-cudnn not timed: RuntimeError: " in output
    assert max(len(line) for line in output.splitlines()) <= 150
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 8 * 3 + 4 * 3
    for row in rows:
        assert "rowmax" in row["seconds"]
        assert row["dtype"] == "bfloat16"
        assert row["ratio"] > 0


def test_stopping_early(tmp_path: Path, shown: Any) -> None:
    """The file holds what was measured, and the output counts the rest."""
    path = tmp_path / "speed.json"
    chosen = ["--suite", "cpu-norms", "--shape", "16,8", "--shape", "8,8", "--json", str(path)]
    output = shown(*TINY, *chosen, "--stop-after", "1e-9")
    assert "stopped after 1e-09 seconds: 16 lines not begun" in output
    assert "cpu-norms, float32" not in output  # no table where nothing was begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["speed", "--suite", "gpu-norms"], "--suite: gpu-norms needs a GPU"),
        (["tune"], "TRITON_INTERPRET is set"),
        (["tune", "--kernel", "backward"], "--kernel: expected names of forward, backward_dkdv"),
        (["tune", "--dim", "65"], "--dim: expected names of 128, 64, 256"),
        (["tune", "--arch", "sm_90"], "--arch: only with --compile"),
        (["tune", "--seconds", "-1"], "--seconds: expected a positive number"),
    ],
)
def test_wrong_calls_without_a_gpu(arguments: list[str], words: str, refused: Any) -> None:
    pytest.importorskip("triton")
    assert words in refused(*arguments)


def test_nothing_to_measure(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "nothing to measure" in refused(
        "speed", "--suite", "gpu-attention", "--shape", "1,12,8,8", "--kind", "gqa"
    )


def test_as_a_module() -> None:
    result = python("-m", "rowmax.bench", "speed", "--suite", "none")
    assert result.returncode == 2
    assert "--suite: expected names of" in result.stderr


def test_former_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    words = "speed --suite gpu-attention --kind causal,plain,plain+dropout --shape 4,16,64,64"
    options = cli.build_parser().parse_args([*words.split(), "--pass", "forward"])
    cases = cli._chosen_cases(options, [SUITES["gpu-attention"]])
    assert [case.kind for case in cases] == ["causal", "full", "full+dropout"]
    assert capsys.readouterr().err.splitlines() == [
        "rowmax.bench: --kind plain is deprecated: use full",
        "rowmax.bench: --kind plain+dropout is deprecated: use full+dropout",
    ]


def test_cases_in_the_order_asked_for() -> None:
    """Kinds in the order of --kind; with --shape-by-shape, all kinds of a shape before the next."""
    words = "speed --suite gpu-attention --kind window,causal,full --pass forward"
    shapes = ["--shape", "4,16,4096,128", "--shape", "4,32,4096,64"]
    found = {}
    for extra in ([], ["--shape-by-shape"]):
        options = cli.build_parser().parse_args([*words.split(), *shapes, *extra])
        cases = cli._chosen_cases(options, [SUITES["gpu-attention"]])
        found[bool(extra)] = [(case.kind, case.shape[1]) for case in cases]
    kinds = ("window", "causal", "full")
    assert found[False] == [(kind, heads) for kind in kinds for heads in (16, 32)]
    assert found[True] == [(kind, heads) for heads in (16, 32) for kind in kinds]
