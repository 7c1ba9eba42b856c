"""Training by several processes: the weights of one process, whoever is lost on the way.

The processes are forked from one that has imported everything, with torchrun's variables; one test
goes through torchrun itself.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from rowmax.transformer import checkpoint as checkpoints
from rowmax.transformer import corpus
from rowmax.transformer.distributed import Workers
from rowmax.transformer.training import step_seed

from .commands import ended, fails, forkserver, free_port, variables

STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "text.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in corpus.generate(60)), "utf-8")
    return path


def command(text: Path, output: Path, *more: str) -> list[str]:
    """Training without dropout, whose masks no other number of processes draws alike."""
    return [
        *("train", "--tsv", str(text), "--output", str(output), "--preset", "demo"),
        *("--vocab-size", "400", "--d-model", "32", "--heads", "2", "--d-ff", "64"),
        *("--batch-tokens", "200", "--steps", str(STEPS), "--backend", "reference"),
        *("--threads", "1", "--join-seconds", "60", *more),
    ]


# What a process does. No function of this file: a new process can't import it.
WORK = """
import os, signal, sys
from rowmax.transformer import cli, training
os.environ.update(environment)
sys.stderr = open(errors, "w", encoding="utf-8")
step = training.Trainer.step
def steps_until_killed(trainer):
    if trainer.steps_done == killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer)
training.Trainer.step = steps_until_killed
sys.exit(cli.main(arguments))
"""


def start(
    folder: Path, *each: Sequence[str], killed: tuple[int, int] = (-1, -1)
) -> list[BaseProcess]:
    """A process for each command; what they say goes to stderr-0 and so on.

    ``killed``: a rank and the steps after which it is.
    """
    context = forkserver()
    port = free_port()
    processes: list[BaseProcess] = []
    for rank, arguments in enumerate(each):
        given = {
            "environment": variables(rank, len(each), port) if len(each) > 1 else {},
            "errors": str(folder / f"stderr-{rank}"),
            "arguments": list(arguments),
            "killed_after": killed[1] if rank == killed[0] else None,
        }
        processes.append(context.Process(target=exec, args=(WORK, given)))
        processes[-1].start()
    return processes


def run(folder: Path, *each: Sequence[str]) -> None:
    assert ended(start(folder, *each)) == [0] * len(each), said(folder, 0)


def said(folder: Path, rank: int) -> str:
    return (folder / f"stderr-{rank}").read_text("utf-8")


def assert_same_weights(run: Path, other: Path) -> None:
    """To rounding, which Adam raises where gradients are nearly zero; the weights moved by 2e-3."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (
            safetensors.torch.load_file(checkpoints.newest(each) / name) for each in (run, other)
        )
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    steps = [checkpoints.load(checkpoints.newest(each)).training["step"] for each in (run, other)]
    assert steps[0] == steps[1]


@pytest.fixture(scope="module")
def one(text, tmp_path_factory) -> Path:
    """A run of one process."""
    folder: Path = tmp_path_factory.mktemp("one")
    run(folder, command(text, folder / "run"))
    return folder / "run"


def test_two_processes_train_the_weights_of_one(text, one, tmp_path):
    two = command(text, tmp_path / "run", "--validation-tsv", str(text))
    run(tmp_path, two, two)
    assert_same_weights(one, tmp_path / "run")
    lines = said(tmp_path, 0)
    assert "2 processes" in lines
    assert re.search(r"step 12: training loss \d", lines)
    assert said(tmp_path, 1) == ""


@pytest.mark.parametrize(
    "more",
    [
        ("--batch-tokens", "40"),  # of one pair, often: two processes have none of it
        ("--accumulate", "2", "--padded"),
        ("--arch", "lstm"),
    ],
    ids=lambda more: more[0],
)
def test_three_processes_train_the_weights_of_one(text, tmp_path, more):
    alone, three = (command(text, tmp_path / name, *more) for name in ("one", "three"))
    if "lstm" in more:
        for arguments in (alone, three):
            for option in ("--heads", "--d-ff"):
                at = arguments.index(option)
                del arguments[at : at + 2]
    run(tmp_path, alone)
    run(tmp_path, three, three, three)
    assert_same_weights(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resumed_by_another_number_of_processes(text, one, tmp_path, before, after):
    first = command(text, tmp_path / "run", "--steps", "5")
    run(tmp_path, *[first] * before)
    second = command(text, tmp_path / "run", "--resume")
    run(tmp_path, *[second] * after)
    assert "resuming after step 5" in said(tmp_path, 0)
    assert_same_weights(one, tmp_path / "run")


def test_a_killed_worker_ends_all_and_leaves_a_checkpoint(text, tmp_path):
    arguments = command(text, tmp_path / "run", "--steps", "30", "--save-every", "5")
    processes = start(tmp_path, arguments, arguments, killed=(1, 13))
    processes[1].join(120)
    processes[0].terminate()  # as torchrun does
    assert ended(processes) == [1, -signal.SIGKILL]
    lines = said(tmp_path, 0).splitlines()
    assert re.search("process 0 of 2: another process ended or is out of reach", lines[-2])
    saved = checkpoints.newest(tmp_path / "run")
    assert lines[-1] == f"interrupted; the same command with --resume goes on from {saved}"
    straight = command(text, tmp_path / "straight", "--steps", "13")
    run(tmp_path, straight)
    assert_same_weights(tmp_path / "straight", tmp_path / "run")


def test_the_first_process_killed(text, tmp_path):
    """The others end; the last checkpoint that was saved stays."""
    arguments = command(text, tmp_path / "run", "--steps", "30", "--save-every", "5")
    assert ended(start(tmp_path, arguments, arguments, killed=(0, 13))) == [-signal.SIGKILL, 1]
    assert "process 1 of 2: another process ended or is out of reach" in said(tmp_path, 1)
    assert checkpoints.load(checkpoints.newest(tmp_path / "run")).training["step"] == 10


def wait_for_checkpoint(processes: Sequence[BaseProcess], run: Path) -> None:
    deadline = time.monotonic() + 60
    while not checkpoints.checkpoints(run):
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.001)


def test_terminated(text, tmp_path):
    """SIGTERM to the first process alone."""
    arguments = command(text, tmp_path / "run", "--steps", "30000", "--save-every", "50")
    processes = start(tmp_path, arguments, arguments)
    wait_for_checkpoint(processes, tmp_path / "run")
    processes[0].terminate()
    assert ended(processes) == [1, 1]
    assert "process 0 of 2: ended by SIGTERM" in said(tmp_path, 0)
    saved = checkpoints.newest(tmp_path / "run")
    assert f"goes on from {saved}" in said(tmp_path, 0)
    assert checkpoints.load(saved).training["step"] % 50


def test_a_first_process_that_can_not_start(text, one, tmp_path):
    """The output holds a run already: every process says why, and the run stays as it is."""
    before = checkpoints.newest(one).stat().st_mtime_ns
    arguments = command(text, one)
    assert ended(start(tmp_path, arguments, arguments)) == [2, 2]
    assert "already holds checkpoints" in said(tmp_path, 0)
    assert "another process failed: process 0: " in said(tmp_path, 1)
    assert "already holds checkpoints" in said(tmp_path, 1)
    assert checkpoints.newest(one).stat().st_mtime_ns == before


def test_processes_with_other_text(text, tmp_path):
    other = tmp_path / "other.tsv"
    other.write_text("".join(f"{a}\t{b}\n" for a, b in corpus.generate(50)), "utf-8")
    commands = command(text, tmp_path / "run"), command(other, tmp_path / "run")
    assert ended(start(tmp_path, *commands))[1] == 2
    assert "process 1 of 2 has data" in said(tmp_path, 1)
    assert not checkpoints.checkpoints(tmp_path / "run")


def test_more_processes_than_pairs(text, tmp_path):
    arguments = command(text, tmp_path / "run", "--batch-tokens", "5")
    assert ended(start(tmp_path, arguments, arguments)) == [2, 2]
    assert "2 processes, but no batch has more than 1 pair" in said(tmp_path, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"RANK": "2"}, "RANK: expected 0 to WORLD_SIZE - 1, which is 1, got 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number"),
        ({}, "process 0 of 2 did not meet the others at 127.0.0.1:.* within 1 s"),
        ({"RANK": "1"}, "process 1 of 2 did not meet the others at 127.0.0.1:.* within 1 s"),
    ],
)
def test_a_rendezvous_that_fails(text, tmp_path, capsys, monkeypatch, changes, message):
    for name, value in {**variables(0, 2, free_port()), **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    arguments = command(text, tmp_path / "run", "--join-seconds", "1")
    assert re.search(message, fails(capsys, *arguments))
    assert not (tmp_path / "run").exists()


def test_other_commands_are_for_one_process(tmp_path, capsys, monkeypatch):
    for name, value in variables(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    message = fails(capsys, "translate", "--model", str(tmp_path), "하나")
    assert "translate is the work of one process, not of 2" in message


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_pair_is_one_process_s(count):
    lengths = np.random.default_rng(0).integers(2, 40, 30)
    parts = [Workers(rank, count).part(lengths) for rank in range(count)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(30))
    tokens = [lengths[part].sum() for part in parts]
    assert max(tokens) - min(tokens) <= lengths.max()
    assert all((np.diff(part) > 0).all() for part in parts)


def test_fewer_pairs_than_processes():
    parts = [Workers(rank, 3).part(np.array([4])).tolist() for rank in range(3)]
    assert parts == [[0], [], []]


def test_dropout_differs_between_processes():
    assert step_seed(5, 7) == step_seed(5, 7, 0)
    assert len({step_seed(5, 7, rank) for rank in range(4)}) == 4


@pytest.mark.slow
def test_torchrun(text, one, tmp_path):
    arguments = command(text, tmp_path / "run")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = (sys.executable, "-m", *launcher, "-m", "rowmax.transformer", *arguments)
    subprocess.run(words, check=True, timeout=120, cwd=tmp_path)
    assert_same_weights(one, tmp_path / "run")
