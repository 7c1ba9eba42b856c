"""Settings of the model and of training, and the presets that hold good values of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, TypeVar

_C = TypeVar("_C")


MAX_STEPS = 2**31 - 1
LARGEST_VOCABULARY = 2**24


class ConfigError(ValueError):
    """A setting that is unknown or out of range."""


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


def _require_positive_ints(config: object, names: str) -> None:
    for name in names.split():
        got = getattr(config, name)
        is_int = isinstance(got, int) and not isinstance(got, bool)
        _require(is_int and got > 0, name, "a positive integer", got)
        most = _MOST.get(name, MAX_STEPS)
        _require(got <= most, name, f"at most {most:,}", got)


# Larger models than these are a mistake, or a file that somebody made to take all memory.
_MOST = {
    "vocab_size": LARGEST_VOCABULARY,
    "encoder_layers": 256,
    "decoder_layers": 256,
    "d_model": 2**16,
    "heads": 2**12,
    "d_ff": 2**18,
    "max_length": 2**20,
}
_MAX_POSITIONS = 2**28  # numbers of the table of positions: 1 GiB


def _require_all(config: object, names: str, expected: str, fits: Callable[[Any], bool]) -> None:
    for name in names.split():
        value = getattr(config, name)
        _require(fits(value), name, expected, value)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < inf


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


RECURRENT = ("rnn", "lstm", "gru")
ARCHITECTURES = ("transformer", *RECURRENT)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the Transformer; the defaults are the base model of the paper's table 3."""

    arch: ClassVar[str] = "transformer"

    vocab_size: int
    encoder_layers: int = 6
    decoder_layers: int = 6
    d_model: int = 512
    heads: int = 8
    d_ff: int = 2048
    dropout: float = 0.1  # on every sub-layer's output and on the embeddings (section 5.4)
    attention_dropout: float = 0.0  # on the attention weights: not in the paper, often used
    pre_norm: bool = False  # normalise before each sub-layer instead of after it
    max_length: int = 256  # tokens of a sentence, its end symbol included

    def __post_init__(self) -> None:
        _require_positive_ints(self, "vocab_size encoder_layers decoder_layers d_model heads d_ff")
        _require_positive_ints(self, "max_length")
        _require_all(self, "dropout attention_dropout", "0 <= p < 1", _is_share)
        _require_all(self, "pre_norm", "true or false", _is_bool)
        expected = f"a multiple of heads = {self.heads}"
        _require(self.d_model % self.heads == 0, "d_model", expected, self.d_model)
        _require(self.d_model % 2 == 0, "d_model", "an even number (sine and cosine)", self.d_model)
        expected = f"max_length * d_model at most {_MAX_POSITIONS:,}"
        fits = self.max_length * self.d_model <= _MAX_POSITIONS
        _require(fits, "max_length", expected, self.max_length)


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes of a recurrent encoder-decoder; see `RecurrentEncoderDecoder`."""

    arch: str  # rnn, lstm or gru
    vocab_size: int
    encoder_layers: int = 2
    decoder_layers: int = 2
    d_model: int = 512  # the decoder's state, and both directions of the encoder's together
    dropout: float = 0.1  # between layers, on the embeddings and on what the softmax reads
    max_length: int = 256  # tokens of a sentence, its end symbol included
    # What torch.nn's recurrent layers are given: (B, L, d_model), or (L, B, d_model). The
    # results are the same.
    batch_first: bool = True

    def __post_init__(self) -> None:
        _require(self.arch in RECURRENT, "arch", f"one of {', '.join(RECURRENT)}", self.arch)
        sizes = "vocab_size encoder_layers decoder_layers d_model max_length"
        _require_positive_ints(self, sizes)
        _require_all(self, "dropout", "0 <= p < 1", _is_share)
        _require_all(self, "batch_first", "true or false", _is_bool)
        _require(self.d_model % 2 == 0, "d_model", "an even number (two directions)", self.d_model)


AnyModelConfig = ModelConfig | RecurrentConfig


def model_settings(arch: str) -> list[str]:
    """The names of the settings that a model of this architecture has."""
    kind = ModelConfig if arch == ModelConfig.arch else RecurrentConfig
    return [field.name for field in dataclasses.fields(kind) if field.name != "arch"]


def model_config(arch: str, values: Mapping[str, Any]) -> AnyModelConfig:
    """The configuration of a model of this architecture."""
    _require(arch in ARCHITECTURES, "arch", f"one of {', '.join(ARCHITECTURES)}", arch)
    if arch == ModelConfig.arch:
        return from_mapping(ModelConfig, values)
    return from_mapping(RecurrentConfig, {**values, "arch": arch})


def preset_config(preset: Preset, arch: str, given: Mapping[str, Any]) -> AnyModelConfig:
    """The preset's model: what of its settings this architecture has, changed by ``given``."""
    known = model_settings(arch)
    values = {name: value for name, value in preset.model.items() if name in known}
    return model_config(arch, {**values, **given})


PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of training. The same settings, data and backend give bitwise the same weights."""

    steps: int = 100_000
    warmup: int = 4_000
    learning_rate: float = 1.0  # a factor on the paper's schedule
    batch_tokens: int = 25_000  # source tokens, and as many target tokens (section 5.1)
    label_smoothing: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    # Whether batches are padded where the model could take them packed: the reference path.
    padded: bool = False
    accumulate: int = 1  # batches of an update
    precision: str = "float32"  # of PRECISIONS: what products are computed in, by autocast

    def __post_init__(self) -> None:
        _require_positive_ints(self, "steps warmup batch_tokens accumulate")
        _require_all(self, "learning_rate clip", "a positive number", _is_positive)
        _require_all(self, "label_smoothing", "0 <= value < 1", _is_share)
        expected = f"one of {', '.join(PRECISIONS)}"
        _require(self.precision in PRECISIONS, "precision", expected, self.precision)
        _require_all(self, "padded", "true or false", _is_bool)
        seed = isinstance(self.seed, int) and 0 <= self.seed < 2**63
        _require(seed, "seed", "an integer from 0 to 2**63 - 1", self.seed)


def from_mapping(kind: type[_C], values: Mapping[str, Any]) -> _C:
    """A configuration from a JSON object; unknown and missing settings are errors."""
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} for {kind.__name__}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ConfigError(f"setting {name!r} of {kind.__name__} is missing")
    return kind(**values)


@dataclass(frozen=True)
class Preset:
    """Settings that go together. ``vocab_size`` is what the tokenizer is asked for."""

    model: Mapping[str, Any]
    training: Mapping[str, Any]
    vocab_size: int
    about: str


PRESETS: dict[str, Preset] = {
    "base": Preset(
        model={},
        training={},
        vocab_size=37_000,
        about="the paper's base model: 6 + 6 layers of 512, for millions of pairs and a GPU",
    ),
    "small": Preset(
        model={
            "encoder_layers": 3,
            "decoder_layers": 3,
            "d_model": 256,
            "heads": 4,
            "d_ff": 512,
            "dropout": 0.3,
            "attention_dropout": 0.1,
        },
        training={"steps": 3_000, "warmup": 800, "batch_tokens": 4_000},
        vocab_size=6_000,
        about="3 + 3 layers of 256, for some ten thousand pairs on a CPU",
    ),
    "demo": Preset(
        model={
            "encoder_layers": 2,
            "decoder_layers": 2,
            "d_model": 128,
            "heads": 4,
            "d_ff": 512,
            "dropout": 0.0,
            "max_length": 64,
        },
        training={
            "steps": 2_400,
            "warmup": 150,
            "learning_rate": 0.25,
            "batch_tokens": 1_000,
            "label_smoothing": 0.0,
        },
        vocab_size=2_400,
        about="2 + 2 layers of 128, trained on the built-in corpus in minutes",
    ),
}
