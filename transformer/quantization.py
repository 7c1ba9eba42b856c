"""Decoding with weights of eight bits."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..console import UsageError
from .interface import TranslationModel
from .linear import Linear


def quantize(model: TranslationModel) -> None:
    """Put int8 in place of the weights of the linear layers, by torch's dynamic quantization.

    A layer then rounds what it reads to eight bits as well, by its range. The embedding, which is
    the last projection too, stays as it is. On the CPU alone, and no longer trainable.
    """
    try:
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    except ImportError as error:
        raise UsageError(f"int8: torch {torch.__version__} has no quantize_dynamic") from error
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # which is looked for
    with warnings.catch_warnings():
        # torch is about to hand this over to torchao, whose layers are slower without a compiler.
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel")
        quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)
