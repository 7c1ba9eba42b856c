"""Commands of the command line that several test files give."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from rowmax.transformer import cli, corpus

TINY = (
    *("--preset", "demo", "--vocab-size", "400", "--d-model", "16", "--heads", "2", "--d-ff", "32"),
    *("--batch-tokens", "200", "--steps", "4", "--save-every", "2", "--backend", "reference"),
)


def write_pairs(folder: Path, count: int, name: str = "text") -> tuple[str, ...]:
    """Two files of the built-in corpus; the options that name them."""
    pairs = corpus.generate(count)
    for side, suffix in enumerate(("ko", "en")):
        lines = "".join(f"{pair[side]}\n" for pair in pairs)
        (folder / f"{name}.{suffix}").write_text(lines, "utf-8")
    return "--source", str(folder / f"{name}.ko"), "--target", str(folder / f"{name}.en")


def forkserver() -> ForkServerContext:
    """Processes forked from one that has imported what training does: to start Python and torch
    anew each time takes longer than the training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [cli.__name__, "torch._dynamo", "tokenizers", "safetensors.torch", "tqdm"]
    )
    return context


def ended(processes: Sequence[BaseProcess]) -> list[int | None]:
    """How each ended."""
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
    return port


def variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in given.items()}}


def fails(capsys, *arguments: str) -> str:
    """The error message of a command that must fail with status 2."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    return captured.err.splitlines()[-1]
