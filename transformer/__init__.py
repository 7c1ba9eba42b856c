"""The Transformer of 'Attention Is All You Need' on rowmax's kernels: train it, translate with it.

``python -m rowmax.transformer --help`` is the command line. In Python, start with `EncoderDecoder`
and `ModelConfig`, or with `load_average`, `build_model` and `translate` for a trained model.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, CheckpointError, build_model, load_average
from .config import PRESETS, ConfigError, ModelConfig, TrainingConfig
from .data import DataError, Dataset, read_parallel, read_tsv
from .decoding import SentenceTooLongError, beam_search, greedy, translate
from .evaluation import Scores, score
from .model import EncoderDecoder
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
    "Scores",
    "SentenceTooLongError",
    "Tokenizer",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "beam_search",
    "build_model",
    "fit",
    "greedy",
    "load_average",
    "read_parallel",
    "read_tsv",
    "score",
    "translate",
]
