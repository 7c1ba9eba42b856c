"""`python -m rowmax.bench speed`: a tiny run, its table and JSON, and every wrong call."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rowmax.bench import cli
from rowmax.bench.report import WIDTH, header_lines

TINY = ["speed", "--seconds", "0.01", "--quick", "--backend", "reference"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rowmax.bench.machine._LARGE", 1 << 14)


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    shapes = ["--shape", "2,2,9,4", "--shape", "16,8"]
    assert cli.main([*TINY, *shapes, "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines()) <= WIDTH
    for word in ("cpu-attention", "cpu-norms", "(2,2,9,4)", "sdpa-math", "geometric means"):
        assert word in output

    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["schema"] == 1
    assert len(document["rows"]) == 4 * 2 + 4 * 2
    assert document["limits"]["float32_fma_flops_per_s"] > 0
    assert document["machine"]["torch_threads"] >= 1
    assert len(document["geometric_means"]) == 16
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


def test_the_selection(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--shape", "1,1,4,4", "--kind", "causal", "--pass", "forward", "--peers", "sdpa"]
    assert cli.main([*TINY, *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "(1,1,4,4)" in line]
    assert len(rows) == 1
    assert rows[0].startswith("causal")
    assert " fwd " in rows[0]


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a compiler"
)
def test_torch_compile_is_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    """Traced and run; what the compiler makes of it is torch's business."""
    chosen = ["--shape", "16,8", "--kind", "rms_norm", "--pass", "forward", "--peers", "compile"]
    assert cli.main([*TINY, *chosen]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "(16,8)" in line]
    assert "fault" not in row


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "cpu-atention"], "--suite: expected names of cpu-attention, cpu-norms"),
        (["--peers", "xformers"], "--peers: expected names of sdpa, sdpa-math"),
        (["--suite", "cpu-norms", "--peers", "sdpa"], "--peers: expected names of torch, naive"),
        (["--kind", "plain,odd"], "got 'odd'"),
        (["--pass", "backward"], "--pass: expected names of forward, forward+backward"),
        (["--shape", "8,8,512"], "--shape: expected cpu-attention: batch,heads,length,head size"),
        (["--suite", "cpu-norms", "--shape", "8,8,512,64"], "cpu-norms: rows,columns"),
        (["--shape", "8,x"], "--shape: expected positive whole numbers"),
        (["--shape", "8,0"], "--shape: expected positive whole numbers"),
        (["--backend", "cuda"], "--backend: expected one of auto, "),
        (["--seconds", "0"], "--seconds: expected a positive number"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--json", "/nonexistent-folder/x.json"], "--json: can't write /nonexistent-folder"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["speed", *arguments])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_kernel_that_fails_the_gate_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rowmax.bench.peers.kernels.rms_norm", lambda x, *_arguments, **_options: x)
    chosen = ["--shape", "16,8", "--kind", "rms_norm", "--pass", "forward", "--peers", "torch"]
    assert cli.main([*TINY, *chosen]) == 1
    output = capsys.readouterr().out
    assert "rowmax not timed: result 0 of 1: largest error" in output
    assert "1 timings are missing" in output


@pytest.mark.parametrize("suite", ["cpu-attention", "cpu-norms"])
def test_the_header_fits(suite: str) -> None:
    assert max(len(line) for line in header_lines(suite)) <= WIDTH


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "rowmax.bench", "speed", "--suite", "none"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--suite: expected names of" in result.stderr
