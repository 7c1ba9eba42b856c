"""bench/on_gpu.sh: with an interpreter that only notes what it is asked for, and dry runs on a GPU
that isn't there (no_gpu/).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rowmax.bench.cli import build_parser
from rowmax.bench.measure.cases import SUITES

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "on_gpu.sh"
TABLE = SCRIPT.parents[1] / "kernels/backends/gpu_triton/configs.json"
CONTACT = ("smoke", "configs", "speed", "kinds", "decode", "flex", "norms", "host")
PROVE = ("gpu", "parity", "sanitize")
MORE = ("tests", "tune", "attention", "all_norms")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout"))), reason="needs bash and timeout"
)

FAKE = """#!/bin/sh
echo "$@" >>"{log}"
case "$*" in *{fails}*) {does} ;; esac
"""


def script(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(
    folder: Path,
    *words: str,
    fails: str = "nothing-of-this",
    does: str = "echo broken; exit 3",
    **settings: str,
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's result, and the arguments of each call of the interpreter."""
    log = folder / "calls"
    log.touch()
    python = folder / "python"
    python.write_text(FAKE.format(log=log, fails=fails, does=does))
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "OUT": str(folder / "out"), **settings}
    return script(*words, **settings), log.read_text().splitlines()


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_help_names_every_part(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "--help")
    assert result.returncode == 0
    assert not calls
    for part in (*CONTACT, *PROVE, *MORE):
        assert re.search(rf"^    {part} ", result.stdout, re.M), part


@pytest.mark.parametrize("words", [("norms", "nrms"), ("",), ()])
def test_an_unknown_part(words: tuple[str, ...], tmp_path: Path) -> None:
    result, calls = run(tmp_path, *words)
    assert result.returncode == 2
    assert f"got '{'nrms' if words and words[0] else ''}'" in result.stderr
    assert not calls


@pytest.mark.parametrize(
    "word,parts,seconds",
    [("contact", CONTACT, 450), ("prove", PROVE, 150)],
    ids=["contact", "prove"],
)
def test_all_fits_its_time(word: str, parts: tuple[str, ...], seconds: int, tmp_path: Path) -> None:
    result, _ = run(tmp_path, word)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"^(\w+): ok", result.stdout, re.M) == list(parts)
    begun = re.findall(r"^=== (\w+), at most (\d+) s", result.stdout, re.M)
    assert [name for name, _ in begun] == list(parts)
    limits = [int(limit) for _, limit in begun]
    # each may take 5 seconds more to be killed in; those of prove run side by side
    assert (max(limits) if word == "prove" else sum(limits)) + 5 < seconds
    log = (tmp_path / "out" / f"{word}.log").read_text()
    assert all(f"=== {part}, " in log and f"\n{part}: ok" in log for part in parts)


@pytest.mark.parametrize("failing", ["decode", "flex", "smoke"])
def test_a_part_that_fails_stops_no_other(tmp_path: Path, failing: str) -> None:
    fails = {"flex": "--peers flex", "decode": "--kind decode"}.get(failing, failing)
    result, _ = run(tmp_path, "contact", fails=f'"{fails}"')
    assert result.returncode == 1
    for part in CONTACT:
        words = "failed with exit status 3" if part == failing else "ok"
        assert f"\n{part}: {words}" in result.stdout
    assert "broken" in (tmp_path / "out" / "contact.log").read_text()


def test_proofs_run_side_by_side(tmp_path: Path) -> None:
    """They share the processes out, one that fails stops no other, and one log comes back.

    Each test run ends once both have begun: one after the other, the first would be stopped.
    """
    both = f'until [ "$(grep -c "m pytest" "{tmp_path}/calls")" -ge 2 ]; do sleep 0.1; done'
    does = f"{both}; echo broken; exit 3"
    result, calls = run(tmp_path, "prove", fails="pytest", does=does, WORKERS="5", LIMIT="60")
    assert result.returncode == 1
    tests = [call for call in calls if call.startswith("-m pytest")]
    assert len(tests) >= 2
    assert sum(" -n 3 " in call for call in tests) == 2
    for part in ("gpu", "parity"):
        assert f"\n{part}: failed with exit status 3" in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prove.log"]
    assert (tmp_path / "out" / "prove.log").read_text().count("\nbroken\n") >= 2


def test_proofs_have_one_common_end(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "prove", LIMIT="500")
    assert re.findall(r"^=== \w+, at most (\d+) s", result.stdout, re.M) == ["140"] * len(PROVE)


def test_a_former_name(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "forms")
    assert "on_gpu.sh: forms is deprecated: use configs" in result.stderr
    assert "\nconfigs: ok" in result.stdout
    assert len(calls) == 1


def test_a_part_that_never_ends(tmp_path: Path) -> None:
    """It is stopped at its limit, and the next one begins."""
    result, calls = run(
        tmp_path, "decode", "norms", fails='"--kind decode"', does="exec sleep 60", LIMIT="5"
    )
    assert result.returncode == 1
    assert "\ndecode: stopped after " in result.stdout
    assert "\nnorms: ok" in result.stdout
    assert len(calls) == 2


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
    found = re.findall(r"--tool (\w+) --error-exitcode 9", tools)
    assert sorted(found) == ["memcheck", "racecheck"]
    assert result.returncode == (0 if fails == "nothing-of-this" else 1)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is installed")
def test_sanitize_says_that_nothing_was_checked(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "sanitize")
    assert result.returncode == 0
    assert not calls
    assert "compute-sanitizer is not installed: nothing was checked" in result.stdout


def test_its_commands_are_understood(tmp_path: Path) -> None:
    """Every option exists, and every peer is one of the suite's."""
    _, calls = run(tmp_path, "contact", *MORE)
    benches = [call.split()[2:] for call in calls if call.startswith("-m rowmax.bench")]
    assert len(benches) == len(CONTACT) + len(MORE) - 1
    for words in benches:
        options = build_parser().parse_args(words)
        if options.command == "speed":
            assert set(options.peers.split(",")) <= set(SUITES[options.suite].peers)
            assert 10 < options.stop_after < 540
            # 40 seconds a shape, and 5 of the part's for the summary
            assert min(40, options.stop_after + 10) <= options.limit < 200


def test_what_comes_back(tmp_path: Path) -> None:
    """No more files than a machine that is lent gives back, and a log is one of them."""
    _, calls = run(tmp_path, "contact")
    written = {
        Path(word).name
        for call in calls
        for option, word in zip(call.split(), call.split()[1:], strict=False)
        if option in ("--json", "--output")
    }
    assert len(written | {path.name for path in (tmp_path / "out").iterdir()}) <= 8


def test_tuning_writes_beside_the_other_results(tmp_path: Path) -> None:
    """Results are stored there key by key, and in the table at the end, even after a failure."""
    before = TABLE.read_text()
    for fails in ("nothing-of-this", "tune"):
        result, calls = run(tmp_path, "tune", fails=fails)
        assert result.returncode == (1 if fails == "tune" else 0)
        assert f"--output {tmp_path}/out/configs.json" in calls[-1]
        assert (tmp_path / "out" / "configs.json").read_text() == before == TABLE.read_text()


# --- a dry run ------------------------------------------------------------------------------------


def dry_run(
    folder: Path, *words: str, before: str | None = None, **settings: str
) -> tuple[str, Path]:
    """The output of the parts, all of which must succeed, and the folder of results."""
    paths = [str(Path(__file__).parent / "no_gpu"), *([] if before is None else [before])]
    out = folder / "out"
    environment = {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(paths),
        "OUT": str(out),
        "TABLE": os.devnull,
        "OMP_NUM_THREADS": "1",
        "SECONDS_A_LINE": "0.01",
        "WORKERS": "1",
        "LIMIT": "250",  # a slow machine is no failure
        **settings,
    }
    result = script(*words, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"^(\w+): ok", result.stdout, re.M) == list(words)
    return result.stdout, out


def test_features_in_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output, _ = dry_run(tmp_path, "smoke")
    assert "no GPU at all, capability 9.0" in output
    assert "measured here: bfloat16 matrix product" in output
    assert len(re.findall(r"^ +[\d.]+ (attention|masked_softmax).* ok$", output, re.M)) > 4
    assert "4 of 4 are right" in output


def test_tuning_in_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    before = TABLE.read_text()
    output, out = dry_run(tmp_path, "configs", TUNE_ARGS="--kernel forward --dim 64")
    assert TABLE.read_text() == before
    assert "1 of 1 configs written" in output
    table = json.loads((out / "configs.json").read_text())["configs"]
    assert f"sm_90/forward/16/64/base: {table['sm_90/forward/16/64/base']}" in output


def test_tables_in_a_dry_run(tmp_path: Path) -> None:
    """Beside a NumPy that is too new for its Numba, which the GPU does not want."""
    pytest.importorskip("triton")
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
    output, out = dry_run(tmp_path, "decode", "norms", "host", before=str(tmp_path))
    for part, rows in (("decode", 3), ("norms", 2)):
        results = json.loads((out / f"{part}.json").read_text())["rows"]
        assert len(results) == rows
        assert all(row["seconds"]["rowmax"]["median"] > 0 for row in results)
    assert "sdpa-cudnn not timed: RuntimeError" in output  # a peer that can't is a line
    assert set(json.loads((out / "host.json").read_text())) == {"machine", "seconds"}
    assert "attention, forward and backward, replay" in output


def test_tests_in_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("xdist")
    output, _ = dry_run(tmp_path, "parity", SAMPLE="2")
    assert "2 passed" in output
    output, _ = dry_run(tmp_path, "gpu", TEST_ARGS="--collect-only")
    assert "test_reduced_overhead" in output
