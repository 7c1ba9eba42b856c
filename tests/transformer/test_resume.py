"""Training that is really killed, again and again, reaches bitwise the same weights.

Each run is a process of its own, forked from one that has imported everything: to start Python and
torch anew each time would take longer than the training.
"""

from __future__ import annotations

import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from rowmax.transformer import checkpoint as checkpoints
from rowmax.transformer import cli, corpus

from .commands import forkserver

STEPS = 60


def command(folder: Path, output: str) -> list[str]:
    options = {
        "tsv": folder / "text.tsv",
        "output": folder / output,
        "preset": "demo",
        "vocab-size": 400,
        "d-model": 32,
        "heads": 2,
        "d-ff": 64,
        "dropout": 0.1,
        "attention-dropout": 0.1,
        "batch-tokens": 200,
        "steps": STEPS,
        "save-every": 2,
        "backend": "reference",
        "threads": 1,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return ["train", "--resume", *words]


def start(arguments: list[str]) -> BaseProcess:
    process = forkserver().Process(target=cli.main, args=(arguments,))
    process.start()
    return process


def run(arguments: list[str]) -> None:
    process = start(arguments)
    process.join()
    assert process.exitcode == 0


def steps_saved(output: Path) -> int:
    found = checkpoints.checkpoints(output)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def kill_after(arguments: list[str], output: Path, step: int, delay: float) -> bool:
    """Start, kill some time after this step's checkpoint; whether it was killed in time."""
    process = start(arguments)
    deadline = time.monotonic() + 120
    while process.is_alive() and steps_saved(output) < step:
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_and_resumed(tmp_path):
    pairs = corpus.generate(150)
    (tmp_path / "text.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs), "utf-8")
    run(command(tmp_path, "straight"))

    killed = command(tmp_path, "killed")
    output = tmp_path / "killed"
    # Before the first checkpoint, at the moment of one, and within a step or a save.
    assert kill_after(killed, output, 0, delay=0.05)
    assert kill_after(killed, output, 4, delay=0.0)
    assert kill_after(killed, output, steps_saved(output) + 10, delay=0.013)
    assert 0 < steps_saved(output) < STEPS
    run(killed)

    for name in ("model.safetensors", "optimizer.safetensors", "training.json"):
        expected, got = (
            (checkpoints.newest(tmp_path / run) / name).read_bytes()
            for run in ("straight", "killed")
        )
        assert got == expected, name
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path):
    pairs = corpus.generate(150)
    (tmp_path / "text.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs), "utf-8")
    run(command(tmp_path, "straight"))
    killed, output = command(tmp_path, "killed"), tmp_path / "killed"
    for attempt in range(10):
        before = steps_saved(output)
        if not kill_after(killed, output, before + 1, delay=0.007 * attempt):
            break
        assert steps_saved(output) >= before
    run(killed)
    expected, got = (
        (checkpoints.newest(tmp_path / run) / "model.safetensors").read_bytes()
        for run in ("straight", "killed")
    )
    assert got == expected
