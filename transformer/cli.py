"""The command line: train, translate, evaluate, demo, and the pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from . import checkpoint as checkpoints
from . import commands as drawing
from . import corpus, demo
from .architectures import new_model
from .attend import AttendError
from .checkpoint import Checkpoint, CheckpointError
from .config import (
    ARCHITECTURES,
    PRESETS,
    RECURRENT,
    AnyModelConfig,
    ConfigError,
    ModelConfig,
    TrainingConfig,
    model_settings,
    preset_config,
)
from .data import DataError, Dataset, SentencePair, read_parallel, read_tsv
from .decoding import SentenceTooLongError, translate
from .evaluation import TOKENIZATIONS, score
from .interface import TranslationModel
from .tokenizer import SMALLEST_VOCABULARY, Tokenizer
from .training import Trainer, TrainingError, fit

BACKENDS = ("auto", "reference", "numba", "native", "triton")
# Lines of standard input that are translated together when it is not a terminal.
_CHUNK = 1_000

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

  Training that was interrupted goes on with the same command and --resume.
"""


class UsageError(Exception):
    """Options that contradict each other or are missing."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main_parser = argparse.ArgumentParser(
        prog="python -m rowmax.transformer",
        description=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_translate(commands)
    _add_evaluate(commands)
    _add_demo(commands)
    _add_pictures(commands)
    return main_parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
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
        ("batch-tokens", _positive, "tokens of a batch on each side, padding included"),
        ("label-smoothing", float, "probability spread over the other tokens"),
        ("clip", float, "largest norm of the gradient"),
        ("seed", int, "of the weights, the batches and dropout"),
    )
    for option, kind, text in training_options:
        training.add_argument(f"--{option}", type=kind, help=text)
    _add_machine(train)
    train.set_defaults(run=_train)


def _add_translate(commands: Any) -> None:
    command = commands.add_parser(
        "translate",
        help="translate sentences",
        description="Translate the sentences given as arguments, or else each line of standard "
        "input; prints one line for each.",
    )
    command.add_argument("sentences", nargs="*", metavar="SENTENCE")
    _add_model(command)
    _add_machine(command)
    command.set_defaults(run=_translate)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
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
    _add_machine(command)
    command.set_defaults(run=_evaluate)


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
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
    _add_machine(command)
    command.set_defaults(run=_demo)


def _add_pictures(commands: Any) -> None:
    attend = drawing.add_attend(commands, _positive)
    _add_decoding(attend)
    _add_machine(attend)
    attend.set_defaults(run=lambda args: drawing.attend(args, _load), arch=None)
    positions = drawing.add_positions(commands, _positive)
    positions.set_defaults(run=drawing.positions)


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
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="a training run's directory, for its newest checkpoint, or one checkpoint",
    )
    _add_decoding(command)


def _add_decoding(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--average",
        type=_positive,
        default=1,
        metavar="N",
        help="use the mean of the newest N checkpoints' weights (the paper: 5; default: 1)",
    )
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def _pairs(
    source: Path | None, target: Path | None, tsv: Path | None, prefix: str = ""
) -> list[SentencePair] | None:
    """The text that the options name, None if they name none."""
    if (source is None) != (target is None):
        raise UsageError(f"--{prefix}source and --{prefix}target go together")
    if source is not None and target is not None:
        if tsv is not None:
            raise UsageError(f"give either --{prefix}source and --{prefix}target or --{prefix}tsv")
        return read_parallel(source, target)
    return None if tsv is None else read_tsv(tsv)


def _device(args: argparse.Namespace) -> torch.device:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    return device


def _train(args: argparse.Namespace) -> None:
    device = _device(args)
    text = _pairs(args.source, args.target, args.tsv)
    validation_text = _pairs(
        args.validation_source, args.validation_target, args.validation_tsv, "validation-"
    )
    if args.built_in:
        if text is not None or validation_text is not None:
            raise UsageError("--built-in brings its own text; give no files with it")
        built_in = corpus.splits()
        text, validation_text = list(built_in.train), list(built_in.validation)
    if text is None:
        raise UsageError("no text to train on: give --source and --target, --tsv, or --built-in")
    with checkpoints.exclusive(args.output):
        saved = _saved(args)
        preset = PRESETS[args.preset]
        if saved is not None:
            tokenizer = saved.tokenizer
        else:
            vocab_size = args.vocab_size or preset.vocab_size
            tokenizer = Tokenizer.train((side for pair in text for side in pair), vocab_size)
        given = {**_given_to_model(args), "vocab_size": tokenizer.vocab_size}
        model_config = preset_config(preset, args.arch, given)
        training_given = _given(args, [field.name for field in dataclasses.fields(TrainingConfig)])
        config = TrainingConfig(**{**preset.training, **training_given})
        if saved is not None:
            _require_same(saved, model_config, config)
        dataset = Dataset(text, tokenizer, model_config.max_length)
        _say(f"training on {len(dataset):,} pairs, vocabulary of {tokenizer.vocab_size:,} subwords")
        if dataset.left_out():
            _say(dataset.left_out())
        validation = None
        if validation_text is not None:
            validation = Dataset(validation_text, tokenizer, model_config.max_length)
        torch.manual_seed(config.seed)
        model = new_model(model_config, args.backend).to(device)
        trainer = Trainer(model, dataset, config)
        if saved is not None:
            trainer.restore(saved)
            _say(f"resuming after step {trainer.steps_done:,} from {saved.path}")
        fit(trainer, tokenizer, args.output, validation, args.save_every, args.keep)
    _say(f"trained {trainer.steps_done:,} steps; the model is in {args.output}")


def _saved(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint to resume from, if there is one and it is wanted."""
    if not checkpoints.checkpoints(args.output):
        if args.resume:
            # Killed before its first checkpoint: starting over is going on.
            _say(f"{args.output} holds no checkpoint yet; starting from the beginning")
        return None
    if not args.resume:
        raise UsageError(
            f"{args.output} already holds checkpoints: add --resume to go on from the newest, or "
            "choose another --output"
        )
    return checkpoints.load(checkpoints.newest(args.output))


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of these settings that were given on the command line."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _given_to_model(args: argparse.Namespace) -> dict[str, Any]:
    """The model's settings that were given; those of another architecture are an error."""
    known = model_settings(args.arch)
    names = (name for arch in ARCHITECTURES for name in model_settings(arch))
    given = _given(args, dict.fromkeys(names))
    for name in given:
        if name not in known:
            raise UsageError(f"--{name.replace('_', '-')} is no setting of --arch {args.arch}")
    return given


def _require_same(saved: Checkpoint, model: AnyModelConfig, training: TrainingConfig) -> None:
    """Refuse to resume with other settings. The number of steps may change: it alters no step."""
    earlier = {
        "arch": saved.model.arch,
        **dataclasses.asdict(saved.model),
        **saved.training.get("training", {}),
    }
    now = {"arch": model.arch, **dataclasses.asdict(model), **dataclasses.asdict(training)}
    for name, value in now.items():
        if name != "steps" and earlier.get(name) != value:
            raise UsageError(
                f"can't resume {saved.path} with --{name.replace('_', '-')} {value}: it was "
                f"trained with {earlier.get(name)}; give the same settings or another --output"
            )


def _load(args: argparse.Namespace) -> tuple[TranslationModel, Tokenizer]:
    device = _device(args)
    if args.length_penalty < 0:
        raise UsageError(f"--length-penalty must not be negative, got {args.length_penalty}")
    saved = checkpoints.load_average(args.model, args.average)
    if args.arch not in (None, saved.model.arch):
        raise UsageError(
            f"--arch {args.arch}: {saved.path} holds a model of --arch {saved.model.arch}"
        )
    model = checkpoints.build_model(saved, args.backend).to(device)
    try:
        model.probe()
    except RuntimeError as error:
        raise UsageError(f"--backend {args.backend}: {error}") from error
    return model, saved.tokenizer


def _translate(args: argparse.Namespace) -> None:
    model, tokenizer = _load(args)
    done = 0
    for sentences in [args.sentences] if args.sentences else _lines(sys.stdin):
        try:
            outputs = translate(model, tokenizer, sentences, args.beam, args.length_penalty)
        except SentenceTooLongError as error:
            raise SentenceTooLongError(done + error.index, error.tokens, error.limit) from error
        for output in outputs:
            print(output, flush=sys.stdin.isatty())
        done += len(sentences)


def _lines(stream: TextIO) -> Iterator[list[str]]:
    """Lines of a stream in chunks: one by one from a terminal, many at once from a file."""
    size = 1 if stream.isatty() else _CHUNK
    chunk: list[str] = []
    try:
        for line in stream:
            chunk.append(line.rstrip("\r\n"))
            if len(chunk) == size:
                yield chunk
                chunk = []
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from error
    if chunk:
        yield chunk


def _evaluate(args: argparse.Namespace) -> None:
    text = _pairs(args.source, args.target, args.tsv)
    if args.built_in:
        if text is not None:
            raise UsageError("--built-in brings its own text; give no files with it")
        text = list(corpus.splits(train=0).test)
    if text is None:
        raise UsageError("no text to test on: give --source and --target, --tsv, or --built-in")
    model, tokenizer = _load(args)
    translations = translate(
        model, tokenizer, [source for source, _ in text], args.beam, args.length_penalty
    )
    if args.translations is not None:
        args.translations.write_text("".join(f"{line}\n" for line in translations), "utf-8")
    scores = score(translations, [target for _, target in text], args.tokenize)
    print(json.dumps(dataclasses.asdict(scores)) if args.json else scores)


def _demo(args: argparse.Namespace) -> None:
    demo.run(args.output, args.steps, args.backend, _device(args))


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the result is the process's exit status."""
    args = parser().parse_args(arguments)
    try:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            # Text is UTF-8 whatever the locale says.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8")
        args.run(args)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _say("interrupted; a training run goes on from its newest checkpoint with --resume")
        return 130
    except (
        UsageError,
        ConfigError,
        DataError,
        CheckpointError,
        TrainingError,
        SentenceTooLongError,
        AttendError,
        OSError,
    ) as error:
        _say(f"error: {error}")
        return 2
    return 0
