"""Every command on a base installation: its --help, and what it says of the extras it lacks."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rowmax.bench.cli import build_parser
from rowmax.transformer.checkpoint import FORMAT
from rowmax.transformer.cli import COMMANDS

from ..processes import python

# All that the extras bring, as rowmax's metadata lists it, and what tests and the linter bring.
EXTRAS = {
    match[1]: match[2]
    for requirement in reversed(metadata.requires("rowmax") or ())  # the first one counts
    if (match := re.match(r"([\w-]+).*extra == ['\"](\w+)['\"]", requirement))
}
# torch itself needs it, by way of sympy.
OPTIONAL = [*sorted(EXTRAS.keys() - {"mpmath"}), "_pytest", "llvmlite", "numba"]


def run_without(names: list[str], script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`script` in a fresh interpreter in which these packages can't be imported."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in names)
    return python("-c", f"import sys\n{blocked}{script}", cwd=folder)


def command(module: str, *arguments: str) -> str:
    """The script of `python -m module arguments`."""
    return f"""
import runpy
sys.argv = [{module!r}, *{list(arguments)!r}]
runpy.run_module({module!r}, run_name="__main__")
"""


def test_the_extras_are_known() -> None:
    assert EXTRAS["safetensors"] == "transformer"
    assert EXTRAS["matplotlib"] == "pictures"
    assert EXTRAS["mpmath"] == "bench"


BENCH = (
    *("speed", "compare", "chart", "record", "new", "verify", "diverge", "loss", "overhead"),
    *("smoke", "swap", "training", "decoding", "tune", "configs", "model"),
)


@pytest.mark.parametrize(
    "module, commands",
    [
        ("rowmax.transformer.cli", ["", *COMMANDS]),
        ("rowmax.bench.cli", ["", *BENCH]),
        ("rowmax.transformer.comparison", [""]),
    ],
)
def test_help_on_a_base_installation(module: str, commands: list[str], tmp_path: Path) -> None:
    script = f"""
from {module} import main
for command in {commands!r}:
    sys.argv = ["", *filter(None, [command]), "--help"]
    try:
        main()
    except SystemExit as ended:
        assert ended.code in (0, None), command
    else:
        raise AssertionError(command)
"""
    done = run_without(OPTIONAL, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(commands)


def test_verify_in_a_terminal_wants_no_extra(tmp_path: Path) -> None:
    arguments = ("verify", "--quick", "--backend", "reference", "--op", "rms_norm")
    options = ("--kind", "none", "--check", "accuracy", "--dtype", "float32")
    script = f"sys.stderr.isatty = lambda: True\n{command('rowmax.bench', *arguments, *options)}"
    done = run_without(["tqdm", "psutil"], script, tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1][:6]) == (0, "passed"), done.stderr
    bar = r'verify: \d+ checks; pip install "rowmax\[bench\]" brings a progress bar\n'
    assert re.fullmatch(bar, done.stderr)


def test_the_list_of_benchs_commands_is_whole() -> None:
    (group,) = (action for action in build_parser()._actions if action.choices)
    assert tuple(name for name in group.choices or () if name != "forms") == BENCH


@pytest.mark.parametrize(
    "module", ["rowmax", "rowmax.kernels", "rowmax.transformer", "rowmax.bench"]
)
def test_as_a_module_on_a_base_installation(module: str, tmp_path: Path) -> None:
    arguments = [] if module in ("rowmax", "rowmax.kernels") else ["--help"]
    done = run_without(OPTIONAL, command(module, *arguments), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "missing, module, arguments",
    [
        ("safetensors", "rowmax.transformer", ["translate", "--model", "run", "x"]),
        ("tokenizers", "rowmax.transformer", ["train", "--tsv", "text.tsv", "--output", "new"]),
        ("sacrebleu", "rowmax.transformer", ["evaluate", "--tsv", "text.tsv", "--model", "run"]),
        ("sacrebleu", "rowmax.transformer", ["demo"]),
        ("matplotlib", "rowmax.transformer", ["positions", "--out", "p.png"]),
        ("matplotlib", "rowmax.bench", ["model", "--data", "built-in"]),
        ("tokenizers", "rowmax.bench", ["model", "--data", "built-in"]),
        ("mpmath", "rowmax.bench", ["verify", "--check", "oracle", "--op", "rms_norm"]),
        ("triton", "rowmax.bench", ["configs"]),
        ("triton", "rowmax.bench", ["tune"]),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    missing: str,
    module: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.tsv").write_text("one\teins\n")
    checkpoint = tmp_path / "run" / "checkpoint-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"format": FORMAT}))
    monkeypatch.chdir(tmp_path)
    for name in [missing, *sys.modules]:
        if name == missing or name.startswith(f"{missing}."):
            monkeypatch.setitem(sys.modules, name, None)
    # It is imported where it is needed: as if for the first time.
    monkeypatch.delitem(sys.modules, "rowmax.bench.verification.high_precision", raising=False)
    monkeypatch.delattr("rowmax.bench.verification.high_precision", raising=False)
    main = importlib.import_module(f"{module}.cli").main
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    last = capsys.readouterr().err.splitlines()[-1].lower()
    assert missing in last
    assert f'is not installed: pip install "rowmax[{EXTRAS[missing]}]"' in last


def test_verify_wants_the_extra_bench_alone(tmp_path: Path) -> None:
    others = [
        name for name, extra in EXTRAS.items() if extra not in ("bench", "test", "wheel", "lint")
    ]
    arguments = ["verify", "--op", "rms_norm", "--check", "oracle,accuracy", "--quick"]
    options = ["--dtype", "float32", "--backend", "reference"]
    done = run_without(
        sorted(set(others) - {"tqdm"}), command("rowmax.bench", *arguments, *options), tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "passed, in" in done.stdout


@pytest.mark.parametrize("module", ["rowmax", "rowmax.kernels", "rowmax.bench"])
def test_a_closed_pipe(module: str, tmp_path: Path) -> None:
    """`| head -1`: a sentence, and the status of a process that SIGPIPE ended."""
    arguments = ["--help"] if module == "rowmax.bench" else []
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
    assert told.endswith("the output was closed before all of it was written\n")
    assert told.count("\n") == 1
    assert process.returncode == 128 + signal.SIGPIPE
