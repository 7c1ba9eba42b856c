"""A trained Transformer as a model of CTranslate2, by its own converter's specifications.

CTranslate2's tokens are this model's, by their text; its weights are these, not rounded unless a
quantization is asked for. It counts a translation's length in another way than `length_penalty`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ..console import from_extra
from .model import AddNorm, DecoderLayer, EncoderDecoder, EncoderLayer, MultiHeadAttention
from .tokenizer import BOS, EOS, PAD

QUANTIZATIONS = ("int8", "int8_float32", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
EPS = 1e-5  # of the norms


class Vocabulary(Protocol):
    """What is asked of a tokenizer."""

    def tokens(self) -> list[str]:
        """Every token's text, by its id."""


def export_ctranslate2(
    model: EncoderDecoder, tokenizer: Vocabulary, folder: Path, quantization: str | None = None
) -> None:
    """Write the model and its vocabulary into ``folder``, which must not be there yet.

    Raises:
        ValueError: an unknown quantization. FileExistsError: the folder is there.
        MissingExtraError: ctranslate2 is not installed.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ValueError(f"quantization: expected one of {known}, got {quantization!r}")
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} is there already")
    with from_extra("ctranslate2"):
        from ctranslate2.specs import TransformerSpec
    config = model.config
    spec = TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers), config.heads, pre_norm=config.pre_norm
    )
    embeddings, positions = _array(model.embedding.weight), _array(model.embedding.positions)
    spec.encoder.embeddings[0].weight = spec.decoder.embeddings.weight = embeddings
    spec.decoder.projection.weight = embeddings
    for side in (spec.encoder, spec.decoder):
        side.position_encodings.encodings = positions
    _set_layers(spec.encoder, model.encoder, model.encoder_norm if config.pre_norm else None)
    _set_layers(spec.decoder, model.decoder, model.decoder_norm if config.pre_norm else None)
    tokens = tokenizer.tokens()
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.bos_token = spec.config.decoder_start_token = tokens[BOS]
    spec.config.eos_token, spec.config.unk_token = tokens[EOS], tokens[PAD]
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = EPS
    spec.validate()
    spec.optimize(quantization=quantization)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as begun:
        made = Path(begun, "model")
        made.mkdir()
        spec.save(str(made))
        made.rename(folder)


def _set_layers(spec: Any, layers: nn.Module, first: nn.Module | None) -> None:
    """`first` is the side's own norm, where it has one: with pre-norm.

    The norm of each sub-layer stands behind it; with pre-norm before it, and one at the end: an
    `AddNorm` then normalises for the sub-layer behind it, and `first` for the first.
    """
    norms: list[Any] = [module for module in layers.modules() if isinstance(module, AddNorm)]
    own = iter(norms if first is None else [first, *norms])
    for each, layer in zip(spec.layer, layers.children(), strict=True):
        assert isinstance(layer, EncoderLayer | DecoderLayer)
        _set_self_attention(each.self_attention, layer.self_attention)
        sublayers = [each.self_attention, each.ffn]
        if isinstance(layer, DecoderLayer):
            across = layer.source_attention
            each.attention.linear[0].weight = _array(across.w_q.weight)
            each.attention.linear[1].weight = _joined(across.w_k, across.w_v)
            each.attention.linear[2].weight = _array(across.w_o.weight)
            sublayers.insert(1, each.attention)
        _set_feed_forward(each.ffn, layer.feed_forward)
        for sublayer in sublayers:
            _set_norm(sublayer.layer_norm, next(own))
    if first is not None:
        _set_norm(spec.layer_norm, next(own))


def _set_self_attention(spec: Any, attention: MultiHeadAttention) -> None:
    spec.linear[0].weight = _joined(attention.w_q, attention.w_k, attention.w_v)
    spec.linear[1].weight = _array(attention.w_o.weight)


def _set_feed_forward(spec: Any, feed_forward: Any) -> None:
    for linear, ours in ((spec.linear_0, feed_forward.w_1), (spec.linear_1, feed_forward.w_2)):
        linear.weight, linear.bias = _array(ours.weight), _array(ours.bias)


def _set_norm(spec: Any, norm: Any) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _joined(*projections: nn.Linear) -> np.ndarray:
    return np.concatenate([_array(projection.weight) for projection in projections])


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
