"""Translation: greedy decoding and beam search, batched, with cached states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .data import pad
from .interface import TranslationModel
from .tokenizer import BOS, EOS, Tokenizer

# A translation may be this much longer than its source (section 6.1).
EXTRA_LENGTH = 50
# Of the length penalty, whose power of any length is then a number in float32.
MAX_ALPHA = 5


class SentenceTooLongError(ValueError):
    """A sentence of more tokens than the limit. ``index`` is its place in the input."""

    def __init__(self, index: int, tokens: int, limit: int) -> None:
        super().__init__(
            f"sentence {index + 1} has {tokens} tokens, but this model takes at most {limit}"
        )
        self.index, self.tokens, self.limit = index, tokens, limit


def length_penalty(length: int | Tensor, alpha: float) -> float | Tensor:
    """((5 + length) / 6) ** alpha (Wu et al., 2016, equation 14)."""
    return ((5 + length) / 6) ** alpha


def _limits(model: TranslationModel, source_lengths: Tensor) -> Tensor:
    """The most tokens of each translation, EOS included: a function of its own source alone."""
    return (source_lengths + EXTRA_LENGTH).clamp(max=model.config.max_length)


@torch.inference_mode()
def greedy(model: TranslationModel, source: Tensor, source_lengths: Tensor) -> list[list[int]]:
    """The likeliest token at each step until EOS. ``source`` (B, Ls) -> B lists of token ids."""
    if len(source) == 0:
        return []
    model.eval()
    limits = _limits(model, source_lengths)
    state = model.start(source, source_lengths)
    token = torch.full((len(source), 1), BOS, device=source.device)
    written: list[Tensor] = []
    done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    while not done.all():
        token = model.decode(token, state).argmax(-1)  # (B, 1)
        written.append(token)
        done |= (token[:, 0] == EOS) | (len(written) >= limits)
    rows = torch.cat(written, dim=1).tolist()
    return [_cut(row[:limit]) for row, limit in zip(rows, limits.tolist(), strict=True)]


def _cut(tokens: list[int]) -> list[int]:
    """The tokens before the first EOS."""
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@torch.inference_mode()
def beam_search(
    model: TranslationModel,
    source: Tensor,
    source_lengths: Tensor,
    beam: int = 4,
    alpha: float = 0.6,
) -> list[list[int]]:
    """The best of the translations found when ``beam`` of them are kept at each step.

    A translation Y scores log P(Y) / length_penalty(|Y|, alpha). A sentence is done when no
    unfinished translation can still beat its best finished one. Shapes: B sentences, K = beam,
    V vocabulary, T tokens so far.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if not 0 <= alpha <= MAX_ALPHA:
        raise ValueError(f"alpha: expected 0 to {MAX_ALPHA}, got {alpha}")
    if len(source) == 0:
        return []
    model.eval()
    B, K, V, device = len(source), beam, model.config.vocab_size, source.device
    limits = _limits(model, source_lengths)  # (B,)
    state = model.start(
        source.repeat_interleave(K, dim=0), source_lengths.repeat_interleave(K, dim=0)
    )
    first_row = torch.arange(B, device=device)[:, None] * K  # (B, 1), of each sentence's beam

    # All beams start equal, so only the first of them may be extended at step one.
    scores = torch.full((B, K), float("-inf"), device=device)
    scores[:, 0] = 0.0
    tokens = torch.full((B, K, 1), BOS, device=device)
    best_scores = torch.full((B,), float("-inf"), device=device)
    best_tokens: list[list[int]] = [[] for _ in range(B)]
    length = 0
    while True:
        length += 1
        logits = model.decode(tokens[:, :, -1].reshape(B * K, 1), state)[:, 0]
        candidates = scores[:, :, None] + logits.float().log_softmax(-1).view(B, K, V)
        # At most K of the 2 K best end here, so at least K go on.
        top, index = candidates.flatten(1).topk(min(2 * K, K * V), dim=1)  # (B, 2 K)
        origin, token = index // V, index % V
        ends = token == EOS

        last = (length >= limits)[:, None]  # what has not ended by now is cut
        finished = torch.where(ends | last, top / length_penalty(length, alpha), float("-inf"))
        finished_score, which = finished.max(1)
        for row in (finished_score > best_scores).nonzero()[:, 0].tolist():
            choice = which[row]
            best_scores[row] = finished_score[row]
            sequence = [*tokens[row, origin[row, choice], 1:].tolist(), int(token[row, choice])]
            best_tokens[row] = _cut(sequence)

        going = torch.where(ends | last, float("-inf"), top)
        scores, keep = going.topk(K, dim=1)  # (B, K)
        origin, token = origin.gather(1, keep), token.gather(1, keep)
        # Scores only fall, so this is the most that an unfinished one can reach.
        reachable = scores[:, 0] / length_penalty(limits, alpha)
        if (best_scores >= reachable).all():
            return best_tokens
        tokens = torch.cat(
            (tokens.gather(1, origin[:, :, None].expand_as(tokens)), token[:, :, None]), dim=2
        )
        state.select((first_row + origin).flatten())


def translate(
    model: TranslationModel,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    beam: int = 1,
    alpha: float = 0.6,
    batch_tokens: int = 4_000,
    too_long: Callable[[SentenceTooLongError], None] | None = None,
) -> list[str]:
    """The translation of each sentence; ``beam=1`` decodes greedily.

    A blank sentence gives an empty one. For a sentence beyond the model's length limit
    ``too_long`` is called with the error, and its translation is empty; without it, the first such
    sentence raises SentenceTooLongError before any work.
    """
    limit = model.config.max_length
    device = next(model.parameters()).device
    encoded = [[*ids, EOS] for ids in tokenizer.encode(sentences)]
    translations = [""] * len(sentences)
    wanted = []
    for index, (ids, sentence) in enumerate(zip(encoded, sentences, strict=True)):
        if len(ids) > limit:
            error = SentenceTooLongError(index, len(ids), limit)
            if too_long is None:
                raise error
            too_long(error)
        elif sentence.strip():
            wanted.append(index)
    # Sentences of like length share a batch, the longest first: memory runs out early or never.
    wanted.sort(key=lambda index: len(encoded[index]), reverse=True)
    while wanted:
        size = max(1, batch_tokens // (beam * len(encoded[wanted[0]])))
        chosen, wanted = wanted[:size], wanted[size:]
        source, lengths = (each.to(device) for each in pad([encoded[i] for i in chosen]))
        if beam == 1:
            outputs = greedy(model, source, lengths)
        else:
            outputs = beam_search(model, source, lengths, beam, alpha)
        for index, text in zip(chosen, tokenizer.decode(outputs), strict=True):
            translations[index] = text
    return translations
