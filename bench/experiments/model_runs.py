"""Training and timing the four architectures under one budget; what `rowmax.bench model` runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ...transformer import (
    PRESETS,
    Dataset,
    Tokenizer,
    Trainer,
    TrainingConfig,
    TrainingError,
    TranslationModel,
    corpus,
    new_model,
    read_parallel,
    score,
    translate,
)
from ...transformer.config import AnyModelConfig, ModelConfig, model_config
from ...transformer.data import Batch, SentencePair
from ..machine import host as machine
from ..options import UsageError

# Tokens a side in each timed step: with the work held fixed, what grows with L is waiting.
STEP_TOKENS = 2_048
_TIMED_ROUNDS = 7
_WARM_UP, _TRIAL = 2, 3
# Of --minutes: what is kept for translation, loading and a machine that slows down.
_RESERVE = 0.25
_MIN_STEPS = 20
# Each architecture is tried in short at each of these, times the corpus's own rate, and keeps the
# one that does best on held-out text: one rate for all would favour whom it suits. Where that is
# the first or the last of them, the search goes on beyond it, by so many more at most.
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
_MORE_RATES = 3
# A pilot takes one step of so many, and has at least so many times the warm-up's steps.
_PILOT = 4
_PILOT_PAIRS = 500
_PILOT_SEED = 2**31 - 1
_VOCABULARY_PAIRS = 30_000  # more of them change the subwords little


@dataclass(frozen=True)
class Corpus:
    """Text, and the settings that all architectures share on it."""

    name: str
    train: Sequence[SentencePair]
    validation: Sequence[SentencePair]
    test: Sequence[SentencePair]
    vocab_size: int
    model: Mapping[str, Any]  # of the Transformer; the others follow in size
    training: TrainingConfig


def built_in_corpus(test_sentences: int) -> Corpus:
    """The demo's corpus and settings."""
    preset = PRESETS["demo"]
    splits = corpus.splits()
    return Corpus(
        "built-in",
        splits.train,
        splits.validation[:_PILOT_PAIRS],
        splits.test[:test_sentences],
        preset.vocab_size,
        preset.model,
        TrainingConfig(**preset.training),
    )


def multi30k_corpus(folder: Path, test_sentences: int) -> Corpus:
    """English to German; as wide as the demo's model, with dropout, since the text is little."""
    preset = PRESETS["demo"]
    test = read_parallel(folder / "test2016.en", folder / "test2016.de")
    return Corpus(
        "multi30k",
        read_parallel(folder / "train.en", folder / "train.de"),
        read_parallel(folder / "val.en", folder / "val.de")[:_PILOT_PAIRS],
        test[:test_sentences],
        5_000,
        {**preset.model, "dropout": 0.2, "max_length": 128},
        TrainingConfig(warmup=400, learning_rate=0.5, batch_tokens=2_000, label_smoothing=0.1),
    )


def parameters_of(config: AnyModelConfig) -> int:
    """Counted on a model without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in new_model(config).parameters())


def matched(arch: str, like: ModelConfig) -> AnyModelConfig:
    """A model of this architecture with as many layers, and of the width that brings it closest
    to the Transformer's number of parameters."""
    if arch == ModelConfig.arch:
        return like
    wanted = parameters_of(like)

    def config_of(half: int) -> AnyModelConfig:
        return model_config(
            arch,
            {
                "vocab_size": like.vocab_size,
                "encoder_layers": like.encoder_layers,
                "decoder_layers": like.decoder_layers,
                "d_model": 2 * half,
                "dropout": like.dropout,
                "max_length": like.max_length,
            },
        )

    low, high = 1, 2_048  # parameters grow with the width: the first half-width with too many
    while low < high:
        middle = (low + high) // 2
        if parameters_of(config_of(middle)) < wanted:
            low = middle + 1
        else:
            high = middle
    candidates = [config_of(half) for half in (low - 1, low) if half > 0]
    return min(candidates, key=lambda config: abs(parameters_of(config) - wanted))


def sequential_steps(config: AnyModelConfig, length: int) -> dict[str, int]:
    """Layers that must run one after the other for L source and L target positions: training,
    where the target is known, and translating token by token."""
    layers = config.encoder_layers + config.decoder_layers
    if isinstance(config, ModelConfig):
        translating = config.encoder_layers + config.decoder_layers * length
        return {"training": layers, "translating": translating}
    return {"training": layers * length, "translating": layers * length}


def _log(message: str) -> None:
    print(message, flush=True)


def measure(
    data: Sequence[str],
    architectures: Sequence[str],
    multi30k: Path | None,
    seeds: int,
    steps: int | None,
    minutes: float,
    test_sentences: int,
    lengths: Sequence[int],
    backend: str,
) -> dict[str, Any]:
    """Everything, as it stands in the JSON."""
    began = perf_counter()
    result: dict[str, Any] = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "backend": backend,
        "seeds": seeds,
        "step_tokens": STEP_TOKENS,
        "corpora": [],
    }
    readers = {"built-in": lambda: built_in_corpus(test_sentences)}
    if multi30k is not None:
        readers["multi30k"] = lambda: multi30k_corpus(multi30k, test_sentences)
    for place, name in enumerate(data):
        # What time is left is shared evenly by the corpora that are left.
        left = 60 * minutes - (perf_counter() - began)
        share = left / (len(data) - place)
        text = readers[name]()
        result["corpora"].append(_corpus(text, architectures, seeds, steps, share, backend, _log))
    configs = _configs(demo_config(max(lengths)), architectures)
    _log("timing a step against L")
    result["step_ms"] = time_steps(configs, lengths, backend)
    result["lengths"] = list(lengths)
    result["sequential"] = {
        arch: [sequential_steps(config, length) for length in lengths]
        for arch, config in configs.items()
    }
    result["minutes"] = (perf_counter() - began) / 60
    result["load_average_after"] = machine.load_average()
    return result


def demo_config(max_length: int) -> ModelConfig:
    """The demo's Transformer, with room for sentences of this length."""
    preset = PRESETS["demo"]
    values = {**preset.model, "vocab_size": preset.vocab_size, "max_length": max_length}
    return ModelConfig(**values)


def _configs(like: ModelConfig, architectures: Sequence[str]) -> dict[str, AnyModelConfig]:
    return {arch: matched(arch, like) for arch in architectures}


def _corpus(
    text: Corpus,
    architectures: Sequence[str],
    seeds: int,
    steps: int | None,
    seconds: float,
    backend: str,
    log: Callable[[str], None],
) -> dict[str, Any]:
    began = perf_counter()
    for_words = text.train[:_VOCABULARY_PAIRS]
    tokenizer = Tokenizer.train((side for pair in for_words for side in pair), text.vocab_size)
    like = ModelConfig(**{**text.model, "vocab_size": tokenizer.vocab_size})
    dataset = Dataset(text.train, tokenizer, like.max_length)
    held_out = Dataset(text.validation, tokenizer, like.max_length)
    configs = _configs(like, architectures)
    a_step = {
        arch: _seconds_a_step(config, dataset, text.training, backend)
        for arch, config in configs.items()
    }
    runs_each = seeds + len(RATES) / _PILOT
    if steps is None:
        left = (seconds - (perf_counter() - began)) * (1 - _RESERVE)
        steps = int(left / (runs_each * sum(a_step.values())))
        if steps < _MIN_STEPS:
            raise UsageError(
                f"--minutes: too few for {text.name}: time for {steps} steps of each run, "
                f"expected at least {_MIN_STEPS}; fewer --seeds, --data or --arch need less"
            )
    log(
        f"{text.name}: {steps:,} steps, {seeds} seeds; training takes about "
        f"{steps * runs_each * sum(a_step.values()) / 60:.0f} minutes"
    )
    warmup = max(1, min(text.training.warmup, steps // _PILOT))
    training = replace(text.training, steps=steps, warmup=warmup)
    rates = {}
    for arch, config in configs.items():
        rates[arch], losses = _best_rate(config, dataset, held_out, training, backend)
        log(
            f"  {arch}: learning rate {rates[arch]:g}; held-out loss of a short run "
            + ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in losses.items())
        )
    runs: dict[str, list[dict[str, float]]] = {arch: [] for arch in configs}
    for seed in range(seeds):
        # In turns, so that a machine that slows down slows all of them.
        for arch, config in configs.items():
            chosen = replace(training, seed=seed, learning_rate=rates[arch])
            one = _train(config, dataset, chosen, text, tokenizer, backend)
            runs[arch].append(one)
            log(
                f"  {arch} seed {seed}: BLEU {one['bleu']:.2f}, exact match "
                f"{one['exact_match']:.1f} %, {one['tokens_per_second']:,.0f} tokens/s"
            )
    return {
        "name": text.name,
        "steps": steps,
        "batch_tokens": training.batch_tokens,
        "test_sentences": len(text.test),
        "models": {
            arch: {
                "d_model": config.d_model,
                "parameters": parameters_of(config),
                "learning_rate": rates[arch],
                "runs": runs[arch],
            }
            for arch, config in configs.items()
        },
    }


def _new_trainer(
    config: AnyModelConfig, dataset: Dataset, training: TrainingConfig, backend: str
) -> Trainer:
    torch.manual_seed(training.seed)
    return Trainer(new_model(config, backend), dataset, training)


def _seconds_a_step(
    config: AnyModelConfig, dataset: Dataset, training: TrainingConfig, backend: str
) -> float:
    """Kernels are compiled by the first steps, which don't count."""
    trainer = _new_trainer(config, dataset, training, backend)
    for _ in range(_WARM_UP):
        trainer.step()
    start = perf_counter()
    for _ in range(_TRIAL):
        trainer.step()
    return (perf_counter() - start) / _TRIAL


def _best_rate(
    config: AnyModelConfig,
    dataset: Dataset,
    held_out: Dataset,
    training: TrainingConfig,
    backend: str,
) -> tuple[float, dict[float, float]]:
    """The learning rate with the least held-out loss, and what each tried came to.

    A pilot goes through the whole schedule in a part of the steps: its step s has the rate of step
    _PILOT * s. Its seed is its own, so that no run that counts repeats it.
    """
    steps, warmup = max(1, training.steps // _PILOT), max(1, training.warmup // _PILOT)

    def loss_at(rate: float) -> float:
        pilot = replace(
            training,
            steps=steps,
            warmup=warmup,
            learning_rate=rate * math.sqrt(warmup / training.warmup),
            seed=_PILOT_SEED,
        )
        trainer = _new_trainer(config, dataset, pilot, backend)
        try:
            for _ in range(steps):
                trainer.step()
            return trainer.validate(held_out)
        except TrainingError:
            return math.inf

    return search([factor * training.learning_rate for factor in RATES], loss_at)


def search(
    rates: Sequence[float], loss_at: Callable[[float], float]
) -> tuple[float, dict[float, float]]:
    """The rate with the least loss, which has a worse one on either side if the search allows."""
    losses = {rate: loss_at(rate) for rate in rates}
    for _ in range(_MORE_RATES):
        best = min(losses, key=losses.__getitem__)
        if best == min(losses):
            losses[best / 2] = loss_at(best / 2)
        elif best == max(losses):
            losses[best * 2] = loss_at(best * 2)
        else:
            break
    return min(losses, key=losses.__getitem__), dict(sorted(losses.items()))


def _train(
    config: AnyModelConfig,
    dataset: Dataset,
    training: TrainingConfig,
    text: Corpus,
    tokenizer: Tokenizer,
    backend: str,
) -> dict[str, float]:
    trainer = _new_trainer(config, dataset, training, backend)
    start = perf_counter()
    tokens = sum(trainer.step().tokens for _ in range(training.steps))
    seconds = perf_counter() - start
    written = translate(trainer.model, tokenizer, [source for source, _ in text.test])
    scores = score(written, [target for _, target in text.test])
    return {
        "bleu": scores.bleu,
        "exact_match": scores.exact_match,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def time_steps(
    configs: Mapping[str, AnyModelConfig], lengths: Sequence[int], backend: str
) -> dict[str, list[float]]:
    """Median ms of forward and backward at each L, the architectures in turns."""
    torch.manual_seed(0)
    models = {arch: new_model(config, backend).train() for arch, config in configs.items()}
    medians: dict[str, list[float]] = {arch: [] for arch in models}
    for length in lengths:
        vocab_size = next(iter(configs.values())).vocab_size
        source, target = torch.randint(3, vocab_size, (2, max(1, STEP_TOKENS // length), length))
        times: dict[str, list[float]] = {arch: [] for arch in models}
        for _ in range(1 + _TIMED_ROUNDS):
            for arch, model in models.items():
                times[arch].append(_timed(model, source, target))
        for arch, all_times in times.items():
            medians[arch].append(1e3 * statistics.median(all_times[1:]))
    return medians


def _timed(model: TranslationModel, source: torch.Tensor, target: torch.Tensor) -> float:
    lengths = torch.full((len(source),), source.shape[1])
    model.zero_grad()
    start = perf_counter()
    model.loss(Batch(source, lengths, target, target, lengths), 0.0).backward()
    return perf_counter() - start
