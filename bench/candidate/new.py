"""`python -m rowmax.bench new my_kernel.py`: a file that both judges accept, to be changed."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import UsageError
from . import templates

FOLDER = Path(templates.__file__).parent
OPS = ("attention", "rms_norm")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="FILE.py")
    command.add_argument("--op", choices=OPS, default=OPS[0], help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    path: Path = options.file
    if path.suffix != ".py":
        raise UsageError(f"new: expected a file that ends in .py, got {path}")
    text = (FOLDER / f"{options.op}.py").read_text("utf-8").replace(" FILE", f" {path}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"new: can't write {path}: {error.strerror}") from error
    print(f"{path}: now try  python -m rowmax.bench verify --function {path} --contract torch")
    return 0
