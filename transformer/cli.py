"""The command line: train, translate, evaluate, demo, and the pictures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import console
from ..console import UsageError, check_outputs, check_text, set_threads, threads_line
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
from .decoding import MAX_ALPHA, SentenceTooLongError, log_likelihoods, translate, translate_n_best
from .distributed import WorkerLostError, device_of, joined, launched, postponed_termination
from .evaluation import require_sacrebleu, score
from .export import export_ctranslate2
from .interface import TranslationModel
from .model import EncoderDecoder
from .options import Handler, parser
from .quantization import quantize
from .sampling import Sampling
from .tokenizer import Tokenizer
from .training import Trainer, TrainingError, fit

# Lines of standard input that are translated together when it is not a terminal.
_CHUNK = 1_000
# A command's exit status where it did its work but for some sentences.
_IN_PART = 1


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
    set_threads(args.threads)
    try:
        device = torch.device(args.device)
        device = device_of(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    return device


def _train(args: argparse.Namespace) -> int:
    device = _device(args)
    text = _pairs(args.source, args.target, args.tsv)
    validation_text = _pairs(
        args.validation_source, args.validation_target, args.validation_tsv, "validation-"
    )
    if args.built_in:
        if text is not None or validation_text is not None:
            raise UsageError("--built-in brings its own text; give no files with it")
    elif text is None:
        raise UsageError("no text to train on: give --source and --target, --tsv, or --built-in")
    with contextlib.ExitStack() as held:
        workers = held.enter_context(joined(device, args.join_seconds))
        if workers.first:  # the others leave the output alone
            held.enter_context(checkpoints.exclusive(args.output))
        if text is None:
            built_in = corpus.splits()
            text, validation_text = list(built_in.train), list(built_in.validation)
        saved = _saved(args) if workers.first else None
        preset = PRESETS[args.preset]
        vocabulary: str | None = None
        if saved is not None:
            vocabulary = saved.tokenizer.to_json()
        elif workers.first:
            vocab_size = args.vocab_size or preset.vocab_size
            sides = (side for pair in text for side in pair)
            vocabulary = Tokenizer.train(sides, vocab_size).to_json()
        tokenizer = Tokenizer.from_json(workers.share("vocabulary", vocabulary))
        given = {**_given_to_model(args), "vocab_size": tokenizer.vocab_size}
        model_config = preset_config(preset, args.arch, given)
        training_given = _given(args, [field.name for field in dataclasses.fields(TrainingConfig)])
        config = TrainingConfig(**{**preset.training, **training_given})
        if saved is not None:
            _require_same(saved, model_config, config)
        dataset = Dataset(text, tokenizer, model_config.max_length)
        workers.require_same(
            {
                "model": dataclasses.asdict(model_config),
                "training": {**dataclasses.asdict(config), "save_every": args.save_every},
                "data": dataset.fingerprint(),
            }
        )
        say = _say if workers.first else _say_nothing
        say(threads_line())
        say(f"training on {len(dataset):,} pairs, vocabulary of {tokenizer.vocab_size:,} subwords")
        if workers.count > 1:
            say(f"{workers.count} processes, each with a part of every batch")
        if dataset.left_out():
            say(dataset.left_out())
        validation = None
        if validation_text is not None:
            validation = Dataset(validation_text, tokenizer, model_config.max_length)
        torch.manual_seed(config.seed)
        model = new_model(model_config, args.backend).to(device)
        trainer = Trainer(model, dataset, config, workers)
        if saved is not None:
            trainer.restore(saved)
            say(f"resuming after step {trainer.steps_done:,} from {saved.path}")
        trainer.follow_first()
        held.enter_context(postponed_termination(workers))
        try:
            fit(trainer, tokenizer, args.output, validation, args.save_every, args.keep)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_interrupted(args.output)) from error
        except TrainingError as error:
            say(f"error: {error}")
            return 1
        except WorkerLostError as error:
            _say(f"error: process {workers.rank} of {workers.count}: {error}; no further step")
            say(_interrupted(args.output))
            return 1
    say(f"trained {trainer.steps_done:,} steps; the model is in {args.output}")
    return 0


def _interrupted(run: Path) -> str:
    saved = checkpoints.checkpoints(run)
    if not saved:
        return "interrupted before the first checkpoint (--save-every): nothing was kept"
    return f"interrupted; the same command with --resume goes on from {saved[-1]}"


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
    settings = saved.training.get("training", {})
    if not isinstance(settings, dict):
        raise CheckpointError(f"{saved.path}: training.json is damaged: its settings are no object")
    earlier = {"arch": saved.model.arch, **dataclasses.asdict(saved.model), **settings}
    now = {"arch": model.arch, **dataclasses.asdict(model), **dataclasses.asdict(training)}
    for name, value in now.items():
        if name != "steps" and earlier.get(name) != value:
            raise UsageError(
                f"can't resume {saved.path} with --{name.replace('_', '-')} {value}: it was "
                f"trained with {earlier.get(name)}; give the same settings or another --output"
            )


def _load(args: argparse.Namespace) -> tuple[TranslationModel, Tokenizer]:
    device = _device(args)
    if not 0 <= args.length_penalty <= MAX_ALPHA:
        raise UsageError(f"--length-penalty: expected 0 to {MAX_ALPHA}, got {args.length_penalty}")
    if args.int8 and device.type != "cpu":
        raise UsageError(f"--int8: on the CPU alone, got --device {args.device}")
    saved = checkpoints.load_average(args.model, args.average)
    if args.beam > saved.model.vocab_size:
        raise UsageError(
            f"--beam: expected at most the {saved.model.vocab_size} tokens of the vocabulary, got "
            f"{args.beam}"
        )
    if args.arch not in (None, saved.model.arch):
        raise UsageError(
            f"--arch {args.arch}: {saved.path} holds a model of --arch {saved.model.arch}"
        )
    model = checkpoints.build_model(saved, args.backend).to(device)
    if args.int8:
        quantize(model)
    try:
        model.probe()
    except RuntimeError as error:
        raise UsageError(f"--backend {args.backend}: {error}") from error
    return model, saved.tokenizer


def _translate(args: argparse.Namespace) -> int:
    for number, sentence in enumerate(args.sentences, start=1):
        check_text(f"sentence {number}", sentence)
    if not args.sentences and sys.stdin is None:
        raise UsageError("no sentence is given, and standard input is closed")
    sampling = _sampling(args)
    if args.n_best is not None and sampling is not None:
        raise UsageError(f"--n-best {args.n_best} is no option of --sample")
    if args.n_best is not None and not args.n_best <= args.beam:
        raise UsageError(f"--n-best {args.n_best}: expected at most --beam, which is {args.beam}")
    model, tokenizer = _load(args)
    generator = None
    if sampling is not None:  # one for all that is read
        generator = sampling.generator(next(model.parameters()).device)
    what = "sentence" if args.sentences else "line"
    done = left = 0
    for sentences in [args.sentences] if args.sentences else _lines(sys.stdin):
        too_long = _TooLong(what, done)
        lines: list[str]
        if args.n_best is not None:
            several = translate_n_best(
                *(model, tokenizer, sentences, args.n_best, args.beam, args.length_penalty),
                too_long=too_long,
            )
            lines = [
                f"{done + at}\t{value:.4f}\t{_one_line(text)}"
                for at, best in enumerate(several, start=1)
                for text, value in best
            ]
        else:
            outputs = translate(
                *(model, tokenizer, sentences, args.beam, args.length_penalty),
                too_long=too_long,
                sampling=sampling,
                generator=generator,
            )
            lines = [_one_line(output) for output in outputs]
        for line in lines:
            print(line, flush=sys.stdin is not None and sys.stdin.isatty())
        done += len(sentences)
        left += too_long.count
    return _IN_PART if left else 0


def _sampling(args: argparse.Namespace) -> Sampling | None:
    """What --sample and its options say."""
    given = _given(args, [field.name for field in dataclasses.fields(Sampling)])
    if not args.sample:
        for name in given:
            raise UsageError(f"--{name.replace('_', '-')} is for --sample alone")
        return None
    if args.beam > 1:
        raise UsageError(f"--beam {args.beam} is no option of --sample")
    try:
        return Sampling(**given)
    except ValueError as error:
        raise UsageError(f"--{str(error).replace('_', '-', 1)}") from error


def _score(args: argparse.Namespace) -> int:
    text = _test_text(args, "nothing to score")
    model, tokenizer = _load(args)
    dataset = Dataset(text, tokenizer, model.config.max_length)
    if dataset.left_out():
        _say(dataset.left_out())
    left_out = {*dataset.blank, *dataset.too_long}
    scores = iter(log_likelihoods(model, dataset))
    for number in range(1, len(text) + 1):
        if number in left_out:
            print()
        else:
            log_p, tokens = next(scores)
            print(f"{log_p:.4f}\t{tokens}")
    return _IN_PART if dataset.too_long else 0


def _test_text(args: argparse.Namespace, missing: str) -> list[SentencePair]:
    """The text that the options name, or the built-in corpus's test set."""
    text = _pairs(args.source, args.target, args.tsv)
    if args.built_in:
        if text is not None:
            raise UsageError("--built-in brings its own text; give no files with it")
        return list(corpus.splits(train=0).test)
    if text is None:
        raise UsageError(f"{missing}: give --source and --target, --tsv, or --built-in")
    return text


def _export(args: argparse.Namespace) -> int:
    saved = checkpoints.load_average(args.model, args.average)
    model = checkpoints.build_model(saved)
    if not isinstance(model, EncoderDecoder):
        raise UsageError(f"{saved.path} holds a model of --arch {saved.model.arch}: not exported")
    if os.path.lexists(args.output):
        raise UsageError(f"--output: {args.output} is there already")
    export_ctranslate2(model, saved.tokenizer, args.output, args.quantization)
    _say(f"the model is in {args.output}")
    return 0


class _TooLong:
    """Says which sentence is beyond the model's limit, of those after the first ``before``."""

    def __init__(self, what: str, before: int = 0) -> None:
        self._what, self._before = what, before
        self.count = 0

    def __call__(self, error: SentenceTooLongError) -> None:
        self.count += 1
        _say(
            f"error: {self._what} {self._before + error.index + 1} has {error.tokens} tokens, but "
            f"this model takes at most {error.limit}: not translated"
        )


def _one_line(text: str) -> str:
    """A translation as a line: a model that is badly trained may write an end of line into it."""
    return text.replace("\r", " ").replace("\n", " ")


def _lines(stream: TextIO) -> Iterator[list[str]]:
    """Lines of a stream in chunks: one by one from a terminal, many at once from a file."""
    size = 1 if stream.isatty() else _CHUNK
    chunk: list[str] = []
    start = "\ufeff"  # the mark of UTF-8 that some editors put before a file
    try:
        for line in stream:
            chunk.append(line.removeprefix(start).removesuffix("\n").removesuffix("\r"))
            start = ""
            if len(chunk) == size:
                yield chunk
                chunk = []
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from error
    if chunk:
        yield chunk


def _evaluate(args: argparse.Namespace) -> int:
    check_outputs(
        {"--translations": args.translations},
        {"--source": args.source, "--target": args.target, "--tsv": args.tsv},
        {"--model": checkpoints.folders(args.model)},
    )
    text = _test_text(args, "no text to test on")
    require_sacrebleu()
    model, tokenizer = _load(args)
    too_long = _TooLong("line")
    sources = [source for source, _ in text]
    translations = translate(
        model, tokenizer, sources, args.beam, args.length_penalty, too_long=too_long
    )
    if args.translations is not None:
        lines = "".join(f"{_one_line(line)}\n" for line in translations)
        args.translations.write_text(lines, "utf-8")
    # A line that is blank on both sides is no sentence.
    scored = [at for at, pair in enumerate(text) if any(side.strip() for side in pair)]
    if len(scored) < len(text):
        _say(f"left out {len(text) - len(scored):,} blank lines")
    scores = score(
        [translations[at] for at in scored], [text[at][1] for at in scored], args.tokenize
    )
    print(json.dumps(dataclasses.asdict(scores)) if args.json else scores)
    return _IN_PART if too_long.count else 0


def _demo(args: argparse.Namespace) -> int:
    device = _device(args)
    _say(threads_line())
    demo.run(args.output, args.steps, args.backend, device)
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _say_nothing(_: str) -> None:
    """In place of `_say`, where another process says it."""


COMMANDS: dict[str, Handler] = {
    "train": _train,
    "translate": _translate,
    "evaluate": _evaluate,
    "score": _score,
    "export": _export,
    "demo": _demo,
    "attend": lambda args: drawing.attend(args, _load),
    "positions": drawing.positions,
}
# What is wrong with a call or its files, as a sentence to the user.
ERRORS = (
    UsageError,
    ConfigError,
    DataError,
    CheckpointError,
    TrainingError,
    WorkerLostError,
    SentenceTooLongError,
    AttendError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the result is the process's exit status."""

    def command() -> int:
        args = parser(COMMANDS).parse_args(arguments)
        _, processes = launched()
        if processes > 1 and args.command != "train":
            raise UsageError(
                f"{args.command} is the work of one process, not of {processes}: start it without "
                "torchrun"
            )
        return int(args.run(args))

    return console.run(command, "error: ", ERRORS)
