"""bench/on_gpu.sh, with an interpreter that only notes what it is asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rowmax.bench.cases import SUITES
from rowmax.bench.cli import build_parser

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "on_gpu.sh"
PHASES = ("install", "parity", "tune", "attention", "compiled", "norms", "sanitize")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout"))), reason="needs bash and timeout"
)

FAKE = """#!/bin/sh
echo "$@" >>"{log}"
case "$*" in *{fails}*) echo broken; exit 3 ;; esac
"""


def run(
    folder: Path, *phases: str, fails: str = "nothing-of-this"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's result, and the arguments of each call of the interpreter."""
    log = folder / "calls"
    log.touch()
    python = folder / "python"
    python.write_text(FAKE.format(log=log, fails=fails))
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "OUT": str(folder / "out")}
    result = subprocess.run(
        ["bash", str(SCRIPT), *phases],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result, log.read_text().splitlines()


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_help_names_every_phase(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "--help")
    assert result.returncode == 0
    assert not calls
    for phase in PHASES:
        assert re.search(rf"^  {phase} ", result.stdout, re.M), phase


def test_an_unknown_phase(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "norms", "nrms")
    assert result.returncode == 2
    assert "got 'nrms'" in result.stderr
    assert not calls


def test_by_default(tmp_path: Path) -> None:
    result, calls = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert calls[0].startswith("-m pip install")
    logs = {path.name for path in (tmp_path / "out").iterdir()}
    phases = ("install", "parity", "tune", "attention", "norms")
    assert logs >= {f"{phase}.log" for phase in phases}
    assert re.findall(r"^(\w+): ok", result.stdout, re.M) == list(phases)


@pytest.mark.parametrize("failing", ["gpu-attention", "gpu-norms"])
def test_a_phase_that_fails_stops_no_other(tmp_path: Path, failing: str) -> None:
    phases = ("attention", "norms", "compiled")
    result, calls = run(tmp_path, *phases, fails=failing)
    assert result.returncode == 1
    assert len(calls) == 4
    spoiled = {failing.removeprefix("gpu-"), "compiled"}
    for phase in phases:
        words = "failed with exit status 3" if phase in spoiled else "ok"
        assert f"\n{phase}: {words}" in result.stdout
        assert (tmp_path / "out" / f"{phase}.log").exists()


@pytest.mark.parametrize("fails", ["nothing-of-this", "bfloat16"])
def test_sanitize(tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanitizer that notes what it is asked for, and runs the command."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/tools"\nshift 4\nexec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result, calls = run(tmp_path, "sanitize", fails=fails)
    tools = (tmp_path / "tools").read_text()
    assert len(calls) == 2
    assert re.findall(r"--tool (\w+) --error-exitcode 9", tools) == ["memcheck", "racecheck"]
    assert result.returncode == (0 if fails == "nothing-of-this" else 1)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is installed")
def test_sanitize_says_that_nothing_was_checked(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "sanitize")
    assert result.returncode == 0
    assert not calls
    assert "compute-sanitizer is not installed: nothing was checked" in result.stdout


def test_its_commands_are_understood(tmp_path: Path) -> None:
    """Every option exists, and every peer is one of the suite's."""
    phases = ["attention", "compiled", "norms", "tune"]
    _, calls = run(tmp_path, *phases)
    benches = [call.split()[2:] for call in calls if call.startswith("-m rowmax.bench")]
    assert len(benches) == 5
    for words in benches:
        options = build_parser().parse_args(words)
        if options.command == "speed":
            assert set(options.peers.split(",")) <= set(SUITES[options.suite].peers)
            assert 60 < options.stop_after < 540


def test_tuning_writes_beside_the_other_results(tmp_path: Path) -> None:
    """What is found lies there key by key, and in the table at the end, whatever became of it."""
    table = SCRIPT.parents[1] / "kernels" / "gpu_triton" / "configurations.json"
    before = table.read_text()
    for fails in ("nothing-of-this", "tune"):
        result, calls = run(tmp_path, "tune", fails=fails)
        assert result.returncode == (1 if fails == "tune" else 0)
        assert f"--output {tmp_path}/out/configurations.json" in calls[-1]
        assert (tmp_path / "out" / "configurations.json").read_text() == before == table.read_text()
