"""Recurrent encoder-decoders with attention: what the Transformer is compared with.

A bidirectional encoder, and a decoder that attends over the encoder's states (Luong et al., 2015,
'Effective Approaches to Attention-based Neural Machine Translation', cited here by section), both
of torch.nn's recurrent layers. Shapes: B sentences, L positions (Ls in the source, Lt in the
target), N decoder layers.

**Two layouts.** torch.nn's recurrent layers take their input as (L, B, d_model), or with
``batch_first`` as (B, L, d_model). A recurrent layer works position by position, and in the first
layout the B vectors of one position lie side by side. The kernels want a sentence's positions side
by side, (B, H, L, D), but only the last dimension has to be without gaps: the transposed view of
an (L, B, d_model) tensor is read where it lies, and nothing is copied. Packed sequences are
stored position by position in either case. So the layout changes no result, and what it costs is
one copy of the source's vectors where packing has to reorder them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..kernels import KeyLengths
from .config import RecurrentConfig
from .interface import Attending, TokenEmbedding, TranslationModel

_LAYERS: dict[str, type[nn.RNN | nn.LSTM | nn.GRU]] = {
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}
# The hidden state (N, B, d_model), and with an LSTM its cell state.
Hidden = tuple[Tensor, ...]


@dataclass
class RecurrentState:
    """What decoding token by token keeps: the source's keys and values, the decoder's states.

    Of K beams a sentence there are K states, one after another: R = B * K of them.
    """

    keys: Tensor  # (B, 1, Ls, d_model)
    values: Tensor  # (B, 1, Ls, d_model)
    mask: KeyLengths
    hidden: Hidden
    fed: Tensor  # (R, 1, d_model), the last attentional vector
    beams: int
    length: int = 0  # target tokens so far

    def reorder(self, origin: Tensor) -> None:
        """Beam k of sentence b goes on from beam origin[b, k]; origin (B, K)."""
        first = torch.arange(len(origin), device=origin.device)[:, None] * self.beams
        self._select((first + origin).flatten())

    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences (B',) alone."""
        self.keys, self.values = self.keys[sentences], self.values[sentences]
        self.mask = KeyLengths(self.mask.lengths[sentences])
        every = torch.arange(self.beams, device=sentences.device)
        self._select((sentences[:, None] * self.beams + every).flatten())

    def _select(self, rows: Tensor) -> None:
        self.hidden = tuple(state[:, rows] for state in self.hidden)
        self.fed = self.fed[rows]


class SourceAttention(Attending):
    """Global attention with the score 'general': score(h_t, h_s) = h_t^T W_a h_s (section 3.1).

    The attentional vector is tanh(W_c [c_t; h_t]), c_t being the weighted sum of the states.
    """

    def __init__(self, d_model: int, backend: str) -> None:
        super().__init__(backend)
        self.w_a = nn.Linear(d_model, d_model, bias=False)
        self.w_c = nn.Linear(2 * d_model, d_model, bias=False)
        for projection in (self.w_a, self.w_c):
            nn.init.xavier_uniform_(projection.weight)

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: KeyLengths) -> Tensor:
        """``hidden`` (R, 1, d_model) -> attentional vector (R, 1, d_model).

        The beams of a sentence are queries over its keys, which are there once.
        """
        queries = hidden.view(len(keys), 1, -1, hidden.shape[2])
        context = self.attend(queries, keys, values, mask).view(hidden.shape)
        return torch.tanh(self.w_c(torch.cat((context, hidden), dim=-1)))


class RecurrentEncoderDecoder(TranslationModel):
    """An RNN, LSTM or GRU that translates; one position at a time in the source and the target.

    Input feeding (section 3.3): each decoder step reads the embedding of the last token beside
    the last attentional vector, so a target's positions can't be computed at once even where all
    its tokens are known.
    """

    def __init__(self, config: RecurrentConfig, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.config: RecurrentConfig = config
        d_model, kind = config.d_model, _LAYERS[config.arch]
        self.embedding = TokenEmbedding(
            config.vocab_size, d_model, config.dropout, config.max_length
        )
        self.encoder = kind(
            d_model,
            d_model // 2,
            config.encoder_layers,
            batch_first=config.batch_first,
            dropout=config.dropout if config.encoder_layers > 1 else 0.0,
            bidirectional=True,
        )
        # From the encoder's last states to the decoder's first ones, for each state that it has.
        self.bridges = nn.ModuleList(
            nn.Linear(d_model, config.decoder_layers * d_model)
            for _ in range(2 if config.arch == "lstm" else 1)
        )
        self.decoder = kind(
            2 * d_model,
            d_model,
            config.decoder_layers,
            batch_first=config.batch_first,
            dropout=config.dropout if config.decoder_layers > 1 else 0.0,
        )
        self.source_attention = SourceAttention(d_model, backend)

    def attention_layers(self) -> dict[str, list[Attending]]:
        return {"cross": [self.source_attention]}

    def encode(self, source: Tensor, source_lengths: Tensor) -> tuple[Tensor, Hidden]:
        """(B, Ls) -> the top layer's states (B, Ls, d_model), and each direction's last ones.

        The sequences are packed: the direction that reads backwards starts at a sentence's own
        end, and padding changes nothing.
        """
        first = self.config.batch_first
        embedded = self.embedding(source)
        packed = pack_padded_sequence(
            embedded if first else embedded.transpose(0, 1),
            source_lengths.cpu(),
            batch_first=first,
            enforce_sorted=False,
        )
        outputs, last = self.encoder(packed)
        states, _ = pad_packed_sequence(outputs, batch_first=first, total_length=source.shape[1])
        return (
            states if first else states.transpose(0, 1),
            last if isinstance(last, tuple) else (last,),
        )

    def start(self, source: Tensor, source_lengths: Tensor, beams: int = 1) -> RecurrentState:
        """Encode the source, project its keys once, and make the decoder's first states."""
        states, last = self.encode(source, source_lengths)
        hidden = []
        for bridge, state in zip(self.bridges, last, strict=True):
            both = torch.cat((state[-2], state[-1]), dim=-1)  # (B, d_model): forward, backward
            layers = torch.tanh(bridge(both)).unflatten(-1, (self.config.decoder_layers, -1))
            beamed = layers.transpose(0, 1).repeat_interleave(beams, dim=1)
            hidden.append(beamed.contiguous())  # as torch.nn asks
        return RecurrentState(
            keys=self.source_attention.w_a(states)[:, None],
            values=states[:, None],
            mask=KeyLengths(source_lengths),
            hidden=tuple(hidden),
            fed=states.new_zeros(len(source) * beams, 1, self.config.d_model),
            beams=beams,
        )

    def read(self, target: Tensor, state: RecurrentState) -> Tensor:
        """The next target tokens (B, L), after those in ``state`` -> (B, L, d_model).

        With K beams, the next token of each: (B, K) -> (B, K, d_model).
        """
        first, dropout = self.config.batch_first, self.config.dropout
        tokens = target.reshape(-1, 1) if state.beams > 1 else target
        embedded = self.embedding(tokens, start=state.length)
        attentional = []
        for x in embedded.split(1, dim=1):  # (B, 1, d_model)
            fed = torch.cat((x, state.fed), dim=-1)
            output, hidden = self.decoder(
                fed if first else fed.transpose(0, 1),
                state.hidden if len(state.hidden) > 1 else state.hidden[0],
            )
            state.hidden = hidden if isinstance(hidden, tuple) else (hidden,)
            state.fed = F.dropout(
                self.source_attention(
                    output if first else output.transpose(0, 1),
                    state.keys,
                    state.values,
                    state.mask,
                ),
                dropout,
                self.training,
            )
            attentional.append(state.fed)
        state.length += tokens.shape[1]
        read = torch.cat(attentional, dim=1)
        return read.view(*target.shape, -1) if state.beams > 1 else read
