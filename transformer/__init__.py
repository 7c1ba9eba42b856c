"""The Transformer of 'Attention Is All You Need' on rowmax's kernels: train it, translate with it.

The recurrent encoder-decoders that came before it are here as well, behind the same interface.
``python -m rowmax.transformer --help`` is the command line. In Python, start with `EncoderDecoder`
and `ModelConfig`, or with `load_average`, `build_model` and `translate` for a trained model.
"""

from __future__ import annotations

from .architectures import new_model
from .checkpoint import Checkpoint, CheckpointError, build_model, load_average
from .config import PRESETS, ConfigError, ModelConfig, RecurrentConfig, TrainingConfig
from .data import DataError, Dataset, read_parallel, read_tsv
from .decoding import (
    SentenceTooLongError,
    beam_search,
    greedy,
    log_likelihoods,
    n_best,
    sample,
    translate,
    translate_n_best,
)
from .evaluation import Scores, score
from .interface import TranslationModel
from .model import EncoderDecoder
from .recurrent import RecurrentEncoderDecoder
from .sampling import Sampling
from .tokenizer import Tokenizer
from .training import Trainer, TrainingError, fit

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Dataset",
    "EncoderDecoder",
    "ModelConfig",
    "RecurrentConfig",
    "RecurrentEncoderDecoder",
    "Sampling",
    "Scores",
    "SentenceTooLongError",
    "Tokenizer",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "TranslationModel",
    "beam_search",
    "build_model",
    "fit",
    "greedy",
    "load_average",
    "log_likelihoods",
    "n_best",
    "new_model",
    "read_parallel",
    "read_tsv",
    "sample",
    "score",
    "translate",
    "translate_n_best",
]
