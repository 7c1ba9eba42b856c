"""The options of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .commands import add_attend, add_positions
from .config import ARCHITECTURES, PRECISIONS, PRESETS, RECURRENT, ModelConfig
from .distributed import JOIN_SECONDS
from .evaluation import TOKENIZATIONS
from .export import QUANTIZATIONS
from .tokenizer import SMALLEST_VOCABULARY

_LONGEST_WAIT = 86_400
BACKENDS = ("auto", "reference", "numba", "native", "triton")
Handler = Callable[[argparse.Namespace], int]

_OVERVIEW = """\
Train the Transformer of 'Attention Is All You Need', or an RNN, LSTM or GRU with attention, on
parallel text and translate with it.

  A first try, with the built-in Korean-English corpus (minutes on two CPU cores):
      python -m rowmax.transformer demo

  Your own text, two files whose line n are translations of each other:
      python -m rowmax.transformer train --preset small --source train.en --target train.de \\
          --validation-source val.en --validation-target val.de --output run
      python -m rowmax.transformer translate --model run "A dog runs."
      python -m rowmax.transformer evaluate --model run --source test.en --target test.de

  Training that was interrupted goes on with the same command and --resume. Several processes
  train one model: torchrun --nproc-per-node 2 -m rowmax.transformer train ...
"""


def parser(run: Mapping[str, Handler]) -> argparse.ArgumentParser:
    """The whole command line; `run` says what each command calls, and `args.run` holds it."""
    main_parser = argparse.ArgumentParser(
        prog="python -m rowmax.transformer",
        description=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_train, _add_translate, _add_evaluate, _add_score, _add_demo, _add_attend):
        _add_machine(add(commands))
    _add_export(commands)
    add_positions(commands, _positive)
    for name, command in commands.choices.items():
        command.set_defaults(run=run[name])
    return main_parser


def _add_train(commands: Any) -> argparse.ArgumentParser:
    train: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a model on parallel text",
        description="Train a model. It needs text (two files, one TSV, or the built-in corpus) and "
        "a directory for its checkpoints. All other settings come from the preset "
        "unless given.",
        epilog="Presets: " + "; ".join(f"{name} = {p.about}" for name, p in PRESETS.items()) + ".",
    )
    _add_text(train, "text to train on")
    validation = train.add_argument_group(
        "validation text (optional; its loss is reported with every checkpoint)"
    )
    validation.add_argument("--validation-source", type=Path, metavar="FILE")
    validation.add_argument("--validation-target", type=Path, metavar="FILE")
    validation.add_argument("--validation-tsv", type=Path, metavar="FILE")
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="checkpoints")
    train.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in the output directory, with the same settings",
    )
    train.add_argument(
        "--save-every", type=_positive, default=500, metavar="STEPS", help="default: %(default)s"
    )
    train.add_argument(
        "--keep",
        type=_positive,
        default=5,
        metavar="N",
        help="checkpoints to keep, the newest ones (default: %(default)s)",
    )
    train.add_argument(
        "--join-seconds",
        type=_seconds,
        default=JOIN_SECONDS,
        metavar="SECONDS",
        help="under torchrun: how long to wait for the other processes (default: %(default)g)",
    )
    model = train.add_argument_group("model (instead of the preset's values)")
    model.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        default=ModelConfig.arch,
        help=f"the Transformer (default), or {', '.join(RECURRENT)}: recurrent layers, the "
        "decoder attending to the encoder, without the options for heads, d-ff, "
        "attention-dropout and pre-norm",
    )
    model_options: tuple[tuple[str, Callable[[str], Any], str], ...] = (
        ("vocab-size", _positive, f"subwords of both languages, at least {SMALLEST_VOCABULARY}"),
        ("encoder-layers", _positive, "encoder layers"),
        ("decoder-layers", _positive, "decoder layers"),
        ("d-model", _positive, "width of the model, and of recurrent states"),
        ("heads", _positive, "attention heads, a divisor of --d-model"),
        ("d-ff", _positive, "width inside the feed-forward layers"),
        ("dropout", float, "on sub-layers and embeddings"),
        ("attention-dropout", float, "on attention weights"),
        ("max-length", _positive, "longest sentence in subwords; longer pairs are left out"),
    )
    for option, kind, text in model_options:
        model.add_argument(f"--{option}", type=kind, help=text)
    model.add_argument(
        "--pre-norm",
        action=argparse.BooleanOptionalAction,
        help="normalise before each sub-layer, not after it",
    )
    model.add_argument(
        "--batch-first",
        action=argparse.BooleanOptionalAction,
        help="for rnn, lstm and gru: hand their layers (batch, length, width), not (length, batch, "
        "width); the results are the same (default: --batch-first)",
    )
    training = train.add_argument_group("training (instead of the preset's values)")
    training_options: tuple[tuple[str, Callable[[str], Any], str], ...] = (
        ("steps", _positive, "updates of the weights"),
        ("warmup", _positive, "steps in which the learning rate rises"),
        ("learning-rate", float, "factor on the paper's schedule"),
        ("batch-tokens", _positive, "tokens of a batch on each side, padding not counted"),
        ("label-smoothing", float, "probability spread over the other tokens"),
        ("clip", float, "largest norm of the gradient"),
        ("accumulate", _positive, "batches whose gradients are summed for an update"),
        ("seed", int, "of the weights, the batches and dropout"),
    )
    for option, kind, text in training_options:
        training.add_argument(f"--{option}", type=kind, help=text)
    training.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="bfloat16: products by autocast, faster where the processor or GPU has instructions "
        "for it, and many times slower elsewhere; weights and sums stay float32",
    )
    training.add_argument(
        "--padded",
        action=argparse.BooleanOptionalAction,
        help="pad the sentences of a batch to one length; a Transformer's are packed otherwise",
    )
    return train


def _add_translate(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "translate",
        help="translate sentences",
        description="Translate the sentences given as arguments, or else each line of standard "
        "input; prints one line for each.",
    )
    command.add_argument("sentences", nargs="*", metavar="SENTENCE")
    _add_model(command)
    command.add_argument(
        "--n-best",
        type=_positive,
        metavar="N",
        help="for --beam: the N best translations of each sentence, a line each: its number, the "
        "score (log P / length penalty) and the text, separated by tabs",
    )
    sampling = command.add_argument_group("sampling (in place of --beam)")
    sampling.add_argument(
        "--sample", action="store_true", help="draw each token from what the model expects"
    )
    sampling.add_argument("--temperature", type=float, help="below 1: likelier tokens (default: 1)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="of the K likeliest tokens alone")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="of the fewest tokens of probability P alone"
    )
    sampling.add_argument("--seed", type=int, help="of the draws (default: 0)")
    return command


def _add_score(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "score",
        help="how likely a model finds given translations",
        description="Print for each pair of sentences the natural logarithm of the probability "
        "that the model gives to the translation, its end included, and its number of tokens, "
        "separated by a tab; an empty line where a side is blank or too long.",
    )
    _add_text(command, "translations to score")
    _add_model(command)
    return command


def _add_export(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a Transformer as a model of CTranslate2",
        description="Write a trained Transformer and its vocabulary as a model of CTranslate2 (the "
        "extra ctranslate2), which then gives the same tokens.",
    )
    _add_checkpoint(command)
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a folder that is not there yet"
    )
    command.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="of the weights (default: as they are)"
    )
    return command


def _add_evaluate(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="compare a model's translations with references",
        description="Translate a test set and report BLEU and chrF with sacrebleu's signatures, "
        "and the share of translations that equal the reference.",
    )
    _add_text(command, "text to test on")
    _add_model(command)
    command.add_argument(
        "--tokenize",
        choices=TOKENIZATIONS,
        default=TOKENIZATIONS[0],
        help="how BLEU cuts words: char or zh for targets without spaces (default: %(default)s)",
    )
    command.add_argument(
        "--translations", type=Path, metavar="FILE", help="also write the translations here"
    )
    command.add_argument("--json", action="store_true", help="print the scores as JSON")
    return command


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="train on the built-in corpus, translate, and compare the naive and the fused path",
        description="Train the demo preset on the built-in Korean-English corpus, score it on "
        "1,000 held-out pairs, translate five of them, and show the naive path (backend "
        "reference) beside the fused one.",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="checkpoints; those of an earlier demo there are replaced (default: %(default)s)",
    )
    command.add_argument("--steps", type=_positive, help="train for fewer or more steps")
    return command


def _add_attend(commands: Any) -> argparse.ArgumentParser:
    attend = add_attend(commands, _positive)
    _add_average(attend)
    _add_decoding(attend)
    attend.set_defaults(arch=None, int8=False)
    return attend


def _add_text(command: argparse.ArgumentParser, title: str) -> None:
    group = command.add_argument_group(title)
    group.add_argument("--source", type=Path, metavar="FILE", help="UTF-8, a sentence a line")
    group.add_argument("--target", type=Path, metavar="FILE", help="its translation, line by line")
    group.add_argument("--tsv", type=Path, metavar="FILE", help="or: source, tab, target")
    group.add_argument(
        "--built-in", action="store_true", help="or: the built-in Korean-English corpus"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        help="what the model must be; a checkpoint of another architecture is an error",
    )
    command.add_argument(
        "--int8",
        action="store_true",
        help="linear layers in eight bits: faster on a CPU, nearly the same scores",
    )
    _add_checkpoint(command)
    _add_decoding(command)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="a training run's directory, for its newest checkpoint, or one checkpoint",
    )
    _add_average(command)


def _add_average(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--average",
        type=_positive,
        default=1,
        metavar="N",
        help="use the mean of the newest N checkpoints' weights (the paper: 5; default: 1)",
    )


def _add_decoding(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--beam", type=_positive, default=1, help="translations kept at each step; 1 is greedy"
    )
    command.add_argument(
        "--length-penalty",
        type=float,
        default=0.6,
        metavar="ALPHA",
        help="for --beam: larger favours longer translations (default: %(default)s)",
    )


def _add_machine(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("machine")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="kernels for attention and norms (default: %(default)s)",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    group.add_argument("--threads", type=_positive, help="CPU threads (default: all cores)")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= _LONGEST_WAIT:
        raise argparse.ArgumentTypeError(
            f"expected above 0, at most {_LONGEST_WAIT:,} seconds, got {text}"
        )
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value
