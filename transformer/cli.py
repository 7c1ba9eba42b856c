"""The command line: train, translate, evaluate, demo, and the pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
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
    AnyModelConfig,
    ConfigError,
    TrainingConfig,
    model_settings,
    preset_config,
)
from .data import DataError, Dataset, SentencePair, read_parallel, read_tsv
from .decoding import SentenceTooLongError, translate
from .evaluation import score
from .interface import TranslationModel
from .options import Handler, parser
from .tokenizer import Tokenizer
from .training import Trainer, TrainingError, fit

# Lines of standard input that are translated together when it is not a terminal.
_CHUNK = 1_000


class UsageError(Exception):
    """Options that contradict each other or are missing."""


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


COMMANDS: dict[str, Handler] = {
    "train": _train,
    "translate": _translate,
    "evaluate": _evaluate,
    "demo": _demo,
    "attend": lambda args: drawing.attend(args, _load),
    "positions": drawing.positions,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the result is the process's exit status."""
    args = parser(COMMANDS).parse_args(arguments)
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
