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

from ..kernels import Causal, Mask, attention, attention_varlen, linear_cross_entropy
from .config import AnyModelConfig
from .data import Batch
from .linear import linear
from .packing import PackedAttention, PackedBatch
from .tokenizer import PAD


class DecodingState(Protocol):
    """What decoding token by token keeps between steps, the encoded source among it."""

    def reorder(self, origin: Tensor) -> None:
        """Beam k of sentence b goes on from beam origin[b, k]; origin (B, K)."""

    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences (B',) alone."""


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

    def forward(self, tokens: Tensor, start: int = 0, together: bool = False) -> Tensor:
        """(B, L) token ids at positions ``start`` and on -> (B, L, d_model).

        ``together``: all at position ``start``, the next tokens of L beams.
        """
        return F.dropout(self.embed(tokens, start, together), self.dropout, self.training)

    def embed(self, tokens: Tensor, start: int, together: bool) -> Tensor:
        """The embeddings before dropout."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens: expected an int64 tensor (batch, length), got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        end = start + (1 if together else tokens.shape[1])
        if end > self.max_length:
            raise ValueError(f"sentence of {end} tokens: max_length is {self.max_length}")
        return self.scaled(tokens)

    def scaled(self, tokens: Tensor) -> Tensor:
        """The rows of these tokens times sqrt(d_model)."""
        return F.embedding(tokens, self.weight) * math.sqrt(self.weight.shape[1])

    def logits(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab_size), the scores before the softmax."""
        return linear(x, self.weight)


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
        mask: Mask | PackedAttention | None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """(B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, Dv) -> (B, H, Lq, Dv).

        Packed: (Tq, H, D), (Tk, H, D), (Tk, H, Dv) -> (Tq, H, Dv), of which no weights are kept.
        """
        if isinstance(mask, PackedAttention):
            return attention_varlen(
                *(query, keys, values, mask.queries.starts, mask.keys.starts),
                mask=Causal("upper_left") if mask.causal else None,
                dropout_p=dropout_p,
                backend=self.backend,
                max_seqlen_q=mask.queries.longest,
                max_seqlen_k=mask.keys.longest,
            )
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
    backend: str
    takes_packed = False  # whether `loss` takes a PackedBatch

    def start(self, source: Tensor, source_lengths: Tensor, beams: int = 1) -> DecodingState:
        """Encode the source (B, Ls) of lengths (B,), of which nothing beyond a length is read."""
        raise NotImplementedError

    def read(self, target: Tensor, state: Any) -> Tensor:
        """The next target tokens (B, L), after those in ``state`` -> what `embedding.logits` makes
        scores of, (B, L, d_model). With K beams, the next token of each: (B, K).

        Puts into ``state``, which `start` returned, what the tokens after them need.
        """
        raise NotImplementedError

    def decode(self, target: Tensor, state: Any) -> Tensor:
        """As `read` -> scores (B, L, vocab_size)."""
        return self.embedding.logits(self.read(target, state))

    def loss(
        self, batch: Batch | PackedBatch, label_smoothing: float, reduction: str = "mean"
    ) -> Tensor:
        """Cross entropy with label smoothing (section 5.4), over the tokens that aren't padding.

        The wanted distribution q gives the right token 1 - smoothing and spreads the rest evenly
        over all tokens. Its cross entropy is KL(q || p) + H(q); H(q) doesn't depend on the model,
        so the gradients are those of the KL divergence.
        """
        if isinstance(batch, PackedBatch):
            read = self.read_packed(batch)
        else:
            read = self.read(batch.target_in, self.start(batch.source, batch.source_lengths))
        return linear_cross_entropy(
            *(read, self.embedding.weight, batch.target_out, label_smoothing, PAD, reduction),
            backend=self.backend,
        )

    def read_packed(self, batch: PackedBatch) -> Tensor:
        """As `read` of all target tokens (T, d_model), where the model takes packed batches."""
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
