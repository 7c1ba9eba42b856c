"""The Transformer of 'Attention Is All You Need' (Vaswani et al., 2017) on rowmax's kernels.

Sections and equations named here are the paper's. Shapes: B sentences, L positions (Ls in the
source, Lt in the target), H heads of size D, d_model = H * D. A packed batch has its T tokens one
after another: what is (B, L, .) elsewhere is (T, .) there.

A layer takes and returns two tensors, ``x`` and ``residual``: what the next sub-layer reads and
what its output is added to. In the paper (post-norm) they are one and the same; with
``pre_norm`` the residual is the sum that no norm has touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import KeyLengths, Mask, add_layer_norm, layer_norm
from .cache import DecoderState, KeysValues, Slots
from .config import ModelConfig
from .interface import Attending, TokenEmbedding, TranslationModel
from .linear import Linear
from .packing import PackedAttention, PackedBatch, Packing


class Embedding(TokenEmbedding):
    """Token embeddings plus sinusoidal positions (section 3.5)."""

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocab_size, config.d_model, config.dropout, config.max_length)
        self.register_buffer("positions", sinusoids(config.max_length, config.d_model), False)

    def embed(self, tokens: Tensor, start: int, together: bool) -> Tensor:
        embedded = super().embed(tokens, start, together)
        length = 1 if together else tokens.shape[1]
        return embedded + self.positions[start : start + length]

    def packed(self, tokens: Tensor, packing: Packing) -> Tensor:
        """(T,) token ids -> (T, d_model)."""
        if packing.longest > self.max_length:
            raise ValueError(
                f"sentence of {packing.longest} tokens: max_length is {self.max_length}"
            )
        embedded = self.scaled(tokens) + self.positions[packing.positions]
        return F.dropout(embedded, self.dropout, self.training)


def sinusoids(length: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(same): (L, d_model)."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    dimension = torch.arange(0, d_model, 2, dtype=torch.float64)
    angle = position / 10_000 ** (dimension / d_model)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(torch.get_default_dtype())


class MultiHeadAttention(Attending):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O (section 3.2.2).

    The projections of all heads stand side by side in one matrix each for Q, K and V.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__(backend)
        self.w_q = Linear(config.d_model, config.d_model, bias=False)
        self.w_k = Linear(config.d_model, config.d_model, bias=False)
        self.w_v = Linear(config.d_model, config.d_model, bias=False)
        self.w_o = Linear(config.d_model, config.d_model, bias=False)
        for projection in (self.w_q, self.w_k, self.w_v, self.w_o):
            nn.init.xavier_uniform_(projection.weight)
        self.heads = config.heads
        self.dropout = config.attention_dropout

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, H, L, D), or (T, d_model) -> (T, H, D); a view."""
        heads = x.unflatten(-1, (self.heads, -1))
        return heads if x.dim() == 2 else heads.transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        return self.split_heads(self.w_k(x)), self.split_heads(self.w_v(x))

    def forward(
        self,
        x: Tensor,
        keys_values: KeysValues,
        mask: Mask | PackedAttention | None,
    ) -> Tensor:
        """Queries from ``x`` (B, Lq, d_model); keys and values from wherever they were made."""
        keys, values = keys_values
        heads = self.attend(
            self.split_heads(self.w_q(x)),
            keys,
            values,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        if x.dim() == 2:
            return self.w_o(heads.flatten(1))
        return self.w_o(heads.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W1 + b1) W2 + b2 (section 3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_1 = Linear(config.d_model, config.d_ff)
        self.w_2 = Linear(config.d_ff, config.d_model)
        for linear in (self.w_1, self.w_2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x), inplace=True))


class Norm(nn.Module):
    """Layer normalisation over d_model. Needed by itself only where a pre-norm stack starts."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, backend=self.backend)


class AddNorm(nn.Module):
    """ "Add & Norm": LayerNorm(residual + Dropout(Sublayer(x))) (sections 3.1 and 5.4).

    Post-norm hands the normalised sum on as the next residual. Pre-norm hands on the sum itself:
    its norm then is the one in front of the next sub-layer, or, after the last, the stack's.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model))
        self.dropout = config.dropout
        self.pre_norm = config.pre_norm
        self.backend = backend

    def forward(self, sublayer: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Both (B, L, d_model) -> (normalised, next residual)."""
        normalised, total = add_layer_norm(
            sublayer,
            residual,
            self.weight,
            self.bias,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return normalised, total if self.pre_norm else normalised


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each with its Add & Norm (figure 1, left)."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config, backend)
        self.add_norm_1 = AddNorm(config, backend)
        self.feed_forward = FeedForward(config)
        self.add_norm_2 = AddNorm(config, backend)

    def forward(
        self, x: Tensor, residual: Tensor, mask: KeyLengths | PackedAttention
    ) -> tuple[Tensor, Tensor]:
        attended = self.self_attention(x, self.self_attention.keys_values(x), mask)
        x, residual = self.add_norm_1(attended, residual)
        return self.add_norm_2(self.feed_forward(x), residual)


class DecoderLayer(nn.Module):
    """Masked self-attention, attention to the source, feed-forward (figure 1, right)."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(config, backend)
        self.add_norm_1 = AddNorm(config, backend)
        self.source_attention = MultiHeadAttention(config, backend)
        self.add_norm_2 = AddNorm(config, backend)
        self.feed_forward = FeedForward(config)
        self.add_norm_3 = AddNorm(config, backend)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        own: KeysValues,
        source: KeysValues,
        own_mask: Mask | PackedAttention,
        source_mask: Mask | PackedAttention,
    ) -> tuple[Tensor, Tensor]:
        """``own``: of the target so far, ``source``: of the top encoder layer's output."""
        x, residual = self.add_norm_1(self.self_attention(x, own, own_mask), residual)
        x, residual = self.add_norm_2(self.source_attention(x, source, source_mask), residual)
        return self.add_norm_3(self.feed_forward(x), residual)


class EncoderDecoder(TranslationModel):
    """The whole Transformer."""

    embedding: Embedding
    takes_packed = True

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.config: ModelConfig = config
        self.embedding = Embedding(config)
        self.encoder = nn.ModuleList(
            EncoderLayer(config, backend) for _ in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(config, backend) for _ in range(config.decoder_layers)
        )
        if config.pre_norm:
            self.encoder_norm = Norm(config, backend)
            self.decoder_norm = Norm(config, backend)

    def attention_layers(self) -> dict[str, list[Attending]]:
        encoder = cast("Iterable[EncoderLayer]", self.encoder)
        decoder = cast("list[DecoderLayer]", list(self.decoder))
        return {
            "encoder": [layer.self_attention for layer in encoder],
            "decoder": [layer.self_attention for layer in decoder],
            "cross": [layer.source_attention for layer in decoder],
        }

    def encode(self, source: Tensor, mask: KeyLengths) -> Tensor:
        """(B, Ls) -> (B, Ls, d_model), the output of the top encoder layer."""
        return self._encoded(self.embedding(source), mask)

    def _encoded(self, residual: Tensor, mask: KeyLengths | PackedAttention) -> Tensor:
        x = self.encoder_norm(residual) if self.config.pre_norm else residual
        for layer in self.encoder:
            x, residual = layer(x, residual, mask)
        return x

    def read_packed(self, batch: PackedBatch) -> Tensor:
        """(T, d_model), the output of the top decoder layer at every target token."""
        source, target = batch.source_packing, batch.target_packing
        memory = self._encoded(
            self.embedding.packed(batch.source, source),
            PackedAttention(source, source, causal=False),
        )
        residual = self.embedding.packed(batch.target_in, target)
        x = self.decoder_norm(residual) if self.config.pre_norm else residual
        own = PackedAttention(target, target, causal=True)
        across = PackedAttention(target, source, causal=False)
        for layer in cast("Iterable[DecoderLayer]", self.decoder):
            keys_values = layer.self_attention.keys_values(x)
            source_keys_values = layer.source_attention.keys_values(memory)
            x, residual = layer(x, residual, keys_values, source_keys_values, own, across)
        return x

    def start(self, source: Tensor, source_lengths: Tensor, beams: int = 1) -> DecoderState:
        """Encode the source; every decoder layer projects its own keys and values from it."""
        memory = self.encode(source, KeyLengths(source_lengths))
        layers = list(cast("Iterable[DecoderLayer]", self.decoder))
        return DecoderState(
            source=[layer.source_attention.keys_values(memory) for layer in layers],
            source_lengths=source_lengths,
            beams=beams,
            own=[Slots() for _ in layers],
        )

    def read(self, target: Tensor, state: DecoderState) -> Tensor:
        """The next target tokens (B, L), after those in ``state`` -> (B, L, d_model).

        With K beams, the next token of each: (B, K) -> (B, K, d_model). Puts keys and values of
        the tokens into ``state``.
        """
        residual = self.embedding(target, start=state.length, together=state.beams > 1)
        x = self.decoder_norm(residual) if self.config.pre_norm else residual
        mask, source_mask = state.advance(target), state.source_mask
        layers = cast("Iterable[DecoderLayer]", self.decoder)
        for layer, own, source in zip(layers, state.own, state.source, strict=True):
            keys_values = own.append(layer.self_attention.keys_values(x))
            x, residual = layer(x, residual, keys_values, source, mask, source_mask)
        return x
