"""Where a model looks while it translates one sentence: the weights, and what names them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decoding import SentenceTooLongError, beam_search, greedy
from .interface import TranslationModel, recording
from .tokenizer import BOS, EOS, Tokenizer

# The kinds of attention in the order of figure 1 of 'Attention Is All You Need'.
KINDS = {
    "encoder": "encoder self-attention",
    "decoder": "masked decoder self-attention",
    "cross": "encoder-decoder attention",
}


class AttendError(ValueError):
    """A picture that was asked for and can't be made."""


@dataclass(frozen=True)
class Attention:
    """One sentence's attention.

    Ls source tokens, Lt tokens that the decoder read (the start symbol and the translation).
    ``weights`` holds for each kind the layers, first to last, each (H, queries, keys): Ls by Ls
    in the encoder, Lt by Lt in the decoder, Lt by Ls across.
    """

    arch: str
    sentence: str
    translation: str
    source: list[str]
    target: list[str]
    weights: dict[str, list[Tensor]]

    def tokens(self, kind: str) -> tuple[list[str], list[str]]:
        """The tokens that look, and those that are looked at."""
        return (
            self.source if kind == "encoder" else self.target,
            self.target if kind == "decoder" else self.source,
        )

    def check(self, kind: str, layer: int | None, head: int | None) -> tuple[int, int | None]:
        """The layer, the last where None was asked for, and the head; AttendError where there is
        no such kind, layer or head. Both count from 1."""
        if kind not in self.weights:
            raise AttendError(
                f"--kind {kind}: this {self.arch} model has no {KINDS[kind]}, only "
                f"{', '.join(self.weights)}"
            )
        layers = self.weights[kind]
        for option, number, count in (
            ("layer", layer, len(layers)),
            ("head", head, len(layers[0])),
        ):
            if number is not None and not 1 <= number <= count:
                these = f"1 to {count}" if count > 1 else "only 1"
                raise AttendError(f"--{option} {number}: the {KINDS[kind]} has {these}")
        return layer if layer is not None else len(layers), head


@torch.inference_mode()
def look(
    model: TranslationModel, tokenizer: Tokenizer, sentence: str, beam: int = 1, alpha: float = 0.6
) -> Attention:
    """Translate a sentence, then read the source and the translation once and keep all weights.

    They come with the fast path's own output (``return_weights``). The decoder's row i is that of
    the step which reads target token i and predicts token i + 1.
    """
    if not sentence.strip():
        raise AttendError("the sentence is empty")
    device = next(model.parameters()).device
    ids = [*tokenizer.encode([sentence])[0], EOS]
    if len(ids) > model.config.max_length:
        raise SentenceTooLongError(0, len(ids), model.config.max_length)
    source = torch.tensor([ids], device=device)
    lengths = torch.tensor([len(ids)], device=device)
    if beam == 1:
        written = greedy(model, source, lengths)[0]
    else:
        written = beam_search(model, source, lengths, beam, alpha)[0]
    read = [BOS, *written][: model.config.max_length]
    layers = model.eval().attention_layers()
    with recording([layer for same in layers.values() for layer in same]):
        model(source, lengths, torch.tensor([read], device=device))
        weights = {
            kind: [torch.cat(layer.recorded or [], dim=2)[0].cpu() for layer in same]
            for kind, same in layers.items()
        }
    return Attention(
        arch=model.config.arch,
        sentence=sentence.strip(),
        translation=tokenizer.decode([written])[0],
        source=tokenizer.pieces(ids),
        target=tokenizer.pieces(read),
        weights=weights,
    )
