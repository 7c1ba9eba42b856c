"""What training, decoding and the command line ask of a model, whatever its architecture.

Shapes: B sentences, L positions (Ls in the source, Lt in the target), H heads, d_model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Causal, KeyLengths, attention
from .config import AnyModelConfig


class DecodingState(Protocol):
    """What decoding token by token keeps between steps, the encoded source among it."""

    def select(self, rows: Tensor) -> None:
        """Go on from these rows (B,) of the batch, each still translating its own sentence."""


class TokenEmbedding(nn.Module):
    """Token embeddings times sqrt(d_model) (section 3.4 of 'Attention Is All You Need').

    The same matrix embeds the source and the target and, transposed, is the linear map before
    the softmax.
    """

    def __init__(self, vocab_size: int, d_model: int, dropout: float, max_length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)
        self.dropout = dropout
        self.max_length = max_length

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """(B, L) token ids at positions ``start`` and on -> (B, L, d_model)."""
        return F.dropout(self.embed(tokens, start), self.dropout, self.training)

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """The embeddings before dropout."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens: expected an int64 tensor (batch, length), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        end = start + tokens.shape[1]
        if end > self.max_length:
            raise ValueError(f"sentence of {end} tokens: max_length is {self.max_length}")
        return F.embedding(tokens, self.weight) * math.sqrt(self.weight.shape[1])

    def logits(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab_size), the scores before the softmax."""
        return F.linear(x, self.weight)


class Attending(nn.Module):
    """A layer that calls the kernels' `attention`, and can keep the weights for a picture."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.recorded: list[Tensor] | None = None  # of each call, while `recording`

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Causal | KeyLengths | None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """(B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, Dv) -> (B, H, Lq, Dv)."""
        if self.recorded is None:
            return attention(
                query, keys, values, mask=mask, dropout_p=dropout_p, backend=self.backend
            )
        out, weights = attention(
            query,
            keys,
            values,
            mask=mask,
            dropout_p=dropout_p,
            backend=self.backend,
            return_weights=True,
        )
        self.recorded.append(weights)
        return out


@contextlib.contextmanager
def recording(layers: list[Attending]) -> Iterator[None]:
    """Within it, each layer keeps the weights (B, H, Lq, Lk) of each of its calls."""
    for layer in layers:
        layer.recorded = []
    try:
        yield
    finally:
        for layer in layers:
            layer.recorded = None


class TranslationModel(nn.Module):
    """An encoder-decoder. ``backend`` names the kernels; it doesn't change what is computed."""

    config: AnyModelConfig
    embedding: TokenEmbedding

    def start(self, source: Tensor, source_lengths: Tensor) -> DecodingState:
        """Encode the source (B, Ls) of lengths (B,), of which nothing beyond a length is read."""
        raise NotImplementedError

    def decode(self, target: Tensor, state: Any) -> Tensor:
        """The next target tokens (B, L), after those in ``state`` -> scores (B, L, vocab_size).

        Puts into ``state``, which `start` returned, what the tokens after them need.
        """
        raise NotImplementedError

    def attention_layers(self) -> dict[str, list[Attending]]:
        """The layers that attend, first to last, by kind: encoder, decoder (both attend to
        themselves) and cross (the decoder to the source). Kinds that a model lacks are left out.
        """
        raise NotImplementedError

    def forward(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> Tensor:
        """Scores of the next token at every target position.

        ``source`` (B, Ls), ``source_lengths`` (B,), ``target`` (B, Lt) starting with BOS
        -> (B, Lt, vocab_size).
        """
        return self.decode(target, self.start(source, source_lengths))

    @torch.inference_mode()
    def probe(self) -> None:
        """Run once on one token: RuntimeError where the backend can't do what this model needs."""
        token = torch.ones(1, 1, dtype=torch.int64, device=self.embedding.weight.device)
        self.eval()(token, token[0], token)
