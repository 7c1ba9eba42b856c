"""`python -m rowmax.bench model`: the Transformer beside RNN, LSTM and GRU, at equal budgets."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ...console import from_extra
from ..options import UsageError, check_backend, check_writable, listed, names_of, set_threads

DATA = ("built-in", "multi30k")
ARCHITECTURES = ("transformer", "lstm", "gru", "rnn")
LENGTHS = (8, 16, 32, 64, 128)
RESULTS = ("comparison.json", "comparison.txt", "comparison.png", "comparison.svg")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data",
        metavar="NAMES",
        help=f"comma-separated, of {listed(DATA)}; default: built-in, and multi30k if it is named",
    )
    command.add_argument(
        "--arch", metavar="NAMES", help=f"comma-separated, of {listed(ARCHITECTURES)}; default: all"
    )
    command.add_argument(
        "--multi30k",
        type=Path,
        metavar="DIR",
        help="with train.en, train.de, test2016.en, test2016.de",
    )
    command.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    budget = command.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes", type=float, default=90.0, help="for everything (default: %(default)g)"
    )
    budget.add_argument("--steps", type=int, help="of training, instead of a time")
    command.add_argument(
        "--test-sentences", type=int, default=1_000, help="to translate (default: %(default)s)"
    )
    command.add_argument(
        "--lengths",
        default=",".join(map(str, LENGTHS)),
        help="for the time of a step (default: %(default)s)",
    )
    command.add_argument("--backend", default="auto", help="of rowmax.kernels (%(default)s)")
    command.add_argument("--threads", type=int, help="default: what torch takes")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("runs/comparison"),
        metavar="DIR",
        help=f"for {listed(RESULTS)} (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit status. What can be wrong is found before it measures."""
    for name in ("seeds", "steps", "test_sentences"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if not 0 < options.minutes < math.inf:
        raise UsageError(f"--minutes: expected a positive number, got {options.minutes:g}")
    check_backend(options.backend)
    lengths = _lengths(options.lengths)
    architectures = names_of("--arch", options.arch, ARCHITECTURES)
    data = names_of("--data", options.data, DATA)
    if options.multi30k is None and options.data is None:
        data.remove("multi30k")
    elif options.multi30k is None and "multi30k" in data:
        raise UsageError("--multi30k: expected the directory of its text, got none")
    elif options.multi30k is not None and not options.multi30k.is_dir():
        raise UsageError(f"--multi30k: {options.multi30k} is no directory")
    with from_extra("pictures"):
        import matplotlib  # noqa: F401
    with from_extra("transformer"):
        import sacrebleu  # noqa: F401
        import tokenizers  # noqa: F401
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: can't make {options.output}: {error.strerror}") from error
    for name in RESULTS:
        check_writable("--output", options.output / name)
    set_threads(options.threads)

    # Only now: the other commands of rowmax.bench need none of rowmax.transformer.
    from ...transformer import DataError, TrainingError
    from . import model_report, model_runs

    try:
        result = model_runs.measure(
            data=data,
            architectures=architectures,
            multi30k=options.multi30k,
            seeds=options.seeds,
            steps=options.steps,
            minutes=options.minutes,
            test_sentences=options.test_sentences,
            lengths=lengths,
            backend=options.backend,
        )
    except (DataError, TrainingError) as error:
        raise UsageError(str(error)) from error
    text = model_report.table(result)
    print(text)
    model_report.write(result, text, options.output)
    print(f"\nwritten to {options.output}: {listed(RESULTS)}")
    return 0


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"--lengths: expected numbers like 8,16,32, got {text}") from error
    if lengths[0] < 2 or lengths[-1] > 1024:
        raise UsageError(f"--lengths: expected numbers from 2 to 1024, got {text}")
    return lengths
