"""From a configuration to the model that it describes."""

from __future__ import annotations

from .config import AnyModelConfig, ModelConfig
from .interface import TranslationModel
from .model import EncoderDecoder
from .recurrent import RecurrentEncoderDecoder


def new_model(config: AnyModelConfig, backend: str = "auto") -> TranslationModel:
    """A model with fresh weights; ``backend`` names the kernels for attention and norms."""
    if isinstance(config, ModelConfig):
        return EncoderDecoder(config, backend)
    return RecurrentEncoderDecoder(config, backend)
