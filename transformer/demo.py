"""The demo: train on the built-in corpus, score, translate, compare naive and fused kernels."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from . import checkpoint as checkpoints
from . import comparison, corpus
from .config import PRESETS, ModelConfig, TrainingConfig
from .data import Dataset
from .decoding import translate
from .evaluation import require_sacrebleu, score
from .model import EncoderDecoder
from .tokenizer import Tokenizer
from .training import Trainer, fit

# Sentences for the subword vocabulary; more of them change it little.
_VOCABULARY_PAIRS = 30_000
# The mean of the last 5 checkpoints, as in section 6.1.
_AVERAGED = 5
_SAVE_EVERY = 100
_SHOWN = 5


def _require_demo(output: Path, config: TrainingConfig) -> None:
    """CheckpointError where the checkpoints that the demo would replace are of other training."""
    for path in checkpoints.checkpoints(output)[-1:]:
        saved = checkpoints.load(path)
        model = {**PRESETS["demo"].model, "vocab_size": saved.model.vocab_size}
        settings = saved.training.get("training")
        same = isinstance(settings, dict) and {**settings, "steps": config.steps}
        if saved.model != ModelConfig(**model) or same != dataclasses.asdict(config):
            raise checkpoints.CheckpointError(
                f"{output} holds checkpoints that no demo made; choose another --output"
            )


def run(output: Path, steps: int | None, backend: str, device: torch.device) -> None:
    """Run the whole demo and print its results."""
    began = time.perf_counter()
    preset = PRESETS["demo"]
    settings = {**preset.training, **({} if steps is None else {"steps": steps})}
    config = TrainingConfig(**settings)
    require_sacrebleu()
    with checkpoints.exclusive(output):
        _require_demo(output, config)
        data = corpus.splits()
        print(
            f"Built-in corpus: {len(data.train):,} pairs to train on, {len(data.validation):,} to "
            f"validate, {len(data.test):,} to test; no pair is in two of them."
        )
        tokenizer = Tokenizer.train(
            (side for pair in data.train[:_VOCABULARY_PAIRS] for side in pair), preset.vocab_size
        )
        model_config = ModelConfig(**{**preset.model, "vocab_size": tokenizer.vocab_size})
        torch.manual_seed(config.seed)
        model = EncoderDecoder(model_config, backend).to(device)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"Transformer: {model_config.encoder_layers} + {model_config.decoder_layers} layers, "
            f"d_model {model_config.d_model}, {model_config.heads} heads, d_ff "
            f"{model_config.d_ff}, {size:,} weights, backend {backend}, "
            f"{torch.get_num_threads()} threads."
        )
        trainer = Trainer(model, Dataset(data.train, tokenizer, model_config.max_length), config)
        validation = Dataset(data.validation, tokenizer, model_config.max_length)
        checkpoints.remove_all(output)
        throughput = fit(trainer, tokenizer, output, validation, _SAVE_EVERY, _AVERAGED)
    averaged = min(_AVERAGED, len(checkpoints.checkpoints(output)))
    mean = checkpoints.build_model(checkpoints.load_average(output, averaged), backend).to(device)
    trained = time.perf_counter() - began
    print(f"Trained {config.steps:,} steps in {trained:.0f} s, {float(throughput):,.0f} tokens/s.")

    translations = translate(mean, tokenizer, [pair.korean for pair in data.test])
    scores = score(translations, [pair.english for pair in data.test])
    print(f"\nOn {scores.sentences:,} test pairs, none of them seen in training:\n{scores}\n")
    for pair, translation in list(zip(data.test, translations, strict=True))[:_SHOWN]:
        print(f"  {pair.korean}\n    {translation}")

    print(f"\nThe same first {comparison.STEPS} steps of training on each path:")
    print(comparison.table(*comparison.compare(output, ("reference", backend), comparison.STEPS)))
    print(
        f"\nThe demo took {time.perf_counter() - began:.0f} s. Translate with its model:\n"
        f'  python -m rowmax.transformer translate --model {output} "{data.test[0].korean}"'
    )
