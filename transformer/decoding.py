"""Translation: greedy, sampled and by beam search, batched, with cached states; and its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Dataset, pad
from .interface import TranslationModel
from .linear import constant_weights
from .sampling import Sampling
from .tokenizer import BOS, EOS, Tokenizer

_T = TypeVar("_T")

# A translation may be this much longer than its source (section 6.1).
EXTRA_LENGTH = 50
# Sentences that are done leave the batch, and what the others keep is copied, once as few are left.
_CROWDED = 0.75
# Of the length penalty, whose power of any length is then a number in float32.
MAX_ALPHA = 5
# Scores of so many tokens side by side have one maximum; and so many at most, where the size of the
# vocabulary asks for more.
_BLOCK, _LARGEST_BLOCK = 64, 256


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


def greedy(model: TranslationModel, source: Tensor, source_lengths: Tensor) -> list[list[int]]:
    """The likeliest token at each step until EOS. ``source`` (B, Ls) -> B lists of token ids."""
    return _write(model, source, source_lengths, _likeliest)


def sample(
    model: TranslationModel,
    source: Tensor,
    source_lengths: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Tokens drawn by ``sampling`` until EOS, from its seed on or from where `generator` stands."""
    drawing = generator or sampling.generator(source.device)
    return _write(model, source, source_lengths, lambda logits: sampling.pick(logits, drawing))


@torch.inference_mode()
@constant_weights()
def _write(
    model: TranslationModel,
    source: Tensor,
    source_lengths: Tensor,
    pick: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """One token after another, each picked of its logits (B', V); who is done leaves the batch."""
    if len(source) == 0:
        return []
    model.eval()
    limits = _limits(model, source_lengths)
    state = model.start(source, source_lengths)
    written = torch.full((len(source), int(limits.max())), EOS, device=source.device)
    going = torch.arange(len(source), device=source.device)
    token = torch.full((len(source),), BOS, device=source.device)
    done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    length = 0
    while len(going):
        token = pick(model.decode(token[:, None], state)[:, 0])  # (B',)
        written[going, length] = token
        length += 1
        done |= (token == EOS) | (length >= limits[going])
        left = _left(done)
        if left is not None:
            going, token, done = going[left], token[left], done[left]
            if len(going):
                state.keep(left)
    rows = written.tolist()
    return [_cut(row[:limit]) for row, limit in zip(rows, limits.tolist(), strict=True)]


def _left(done: Tensor) -> Tensor | None:
    """The sentences (B',) that go on; None while so few are done that all may as well."""
    left = (~done).nonzero()[:, 0]
    return left if len(left) <= _CROWDED * len(done) else None


def _cut(tokens: list[int]) -> list[int]:
    """The tokens before the first EOS."""
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


class Hypothesis(NamedTuple):
    """A translation: token ids before EOS, and log P / length_penalty."""

    tokens: list[int]
    score: float


def beam_search(
    model: TranslationModel,
    source: Tensor,
    source_lengths: Tensor,
    beam: int = 4,
    alpha: float = 0.6,
) -> list[list[int]]:
    """The best of the translations found when ``beam`` of them are kept at each step."""
    return [best[0].tokens for best in n_best(model, source, source_lengths, beam, alpha, 1)]


@torch.inference_mode()
@constant_weights()
def n_best(
    model: TranslationModel,
    source: Tensor,
    source_lengths: Tensor,
    beam: int = 4,
    alpha: float = 0.6,
    count: int = 1,
) -> list[list[Hypothesis]]:
    """For each sentence the ``count`` best translations of a beam search, the best first.

    A translation Y scores log P(Y) / length_penalty(|Y|, alpha). A sentence is done, and leaves the
    batch, when no unfinished translation can still be one of its best; there may be fewer than
    ``count`` where the vocabulary is small. Shapes: B sentences, K = beam, V vocabulary, T tokens
    so far.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if not 1 <= count <= beam:
        raise ValueError(f"count: expected 1 to the beam's {beam}, got {count}")
    if not 0 <= alpha <= MAX_ALPHA:
        raise ValueError(f"alpha: expected 0 to {MAX_ALPHA}, got {alpha}")
    if len(source) == 0:
        return []
    model.eval()
    B, K, V, device = len(source), beam, model.config.vocab_size, source.device
    width = min(2 * K, K * V)  # at most K of 2 K end, so at least K go on
    limits = _limits(model, source_lengths)  # (B,)
    state = model.start(source, source_lengths, beams=K)
    found: list[list[Hypothesis]] = [[] for _ in range(B)]
    # Of the sentences that go on, B' of them:
    going = torch.arange(B, device=device)
    # All beams start equal, so only the first of them may be extended at step one.
    scores = torch.full((B, K), float("-inf"), device=device)
    scores[:, 0] = 0.0
    tokens = torch.full((B, K, 1), BOS, device=device)
    worst = torch.full((B,), float("-inf"), device=device)  # of those found, once there are `count`
    length = 0
    while True:
        length += 1
        logits = model.decode(tokens[:, :, -1], state)
        log_p = _log_softmax(logits.float())  # (B', K, V)
        top, index = _best(log_p.add_(scores[:, :, None]).flatten(1), width)  # (B', 2 K)
        origin, token = index // V, index % V
        ends = (token == EOS) | (length >= limits)[:, None]  # what has not ended by now is cut

        finished = torch.where(ends, top / length_penalty(length, alpha), float("-inf"))
        for row, column in (finished > worst[:, None]).nonzero().tolist():
            best = found[int(going[row])]
            sequence = [*tokens[row, origin[row, column], 1:].tolist(), int(token[row, column])]
            best.append(Hypothesis(_cut(sequence), float(finished[row, column])))
            best.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
            del best[count:]
            if len(best) == count:
                worst[row] = best[-1].score

        scores, keep = torch.where(ends, float("-inf"), top).topk(K, dim=1)  # (B', K)
        origin, token = origin.gather(1, keep), token.gather(1, keep)
        # Scores only fall, so this is the most that an unfinished one can reach.
        done = worst >= scores[:, 0] / length_penalty(limits, alpha)
        done |= scores[:, 0] == float("-inf")
        if done.all():
            if not all(found):
                number = found.index([]) + 1
                raise ValueError(f"sentence {number}: the model gives no token a score but NaN")
            return found
        tokens = torch.cat(
            (tokens.gather(1, origin[:, :, None].expand_as(tokens)), token[:, :, None]), dim=2
        )
        state.reorder(origin)
        left = _left(done)
        if left is not None:
            state.keep(left)
            going, scores, tokens = going[left], scores[left], tokens[left]
            worst, limits = worst[left], limits[left]


def _log_softmax(logits: Tensor) -> Tensor:
    """logits.log_softmax(-1); on a CPU in their place, for another tensor of this size would be new
    memory in each step."""
    return torch.log_softmax(logits, -1, out=logits if logits.is_cpu else None)


def _likeliest(scores: Tensor) -> Tensor:
    """scores.argmax(-1) of (B, V): the first of the largest in each row."""
    blocks = _blocks(scores, 1)
    if blocks is None:
        return scores.argmax(-1)
    first = blocks.amax(-1).argmax(-1)  # (B,), of the blocks
    each = torch.arange(len(blocks))
    return first * blocks.shape[2] + blocks[each, first].argmax(-1)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """scores.topk(count) of (B, N), but for the order of equal ones."""
    blocks = _blocks(scores, count)
    if blocks is None:
        return scores.topk(count)
    size = blocks.shape[2]
    chosen = blocks.amax(-1).topk(count).indices  # (B, count), of the blocks
    each = torch.arange(len(blocks))[:, None]
    top, at = blocks[each, chosen].flatten(1).topk(count)
    return top, chosen.gather(1, at // size) * size + at % size


def _blocks(scores: Tensor, count: int) -> Tensor | None:
    """(B, N) as (B, blocks, size), where a look at each block's maximum is the faster way to the
    `count` largest scores: they lie in the `count` blocks of the largest maxima.

    On a CPU `topk` and `argmax` compare number by number, and `amax` whole vectors.
    """
    columns = scores.shape[1]
    for size in range(_BLOCK, _LARGEST_BLOCK + 1) if scores.is_cpu else ():
        if columns % size == 0 and columns >= 4 * count * size:
            return scores.unflatten(1, (-1, size))
    return None


def translate(
    model: TranslationModel,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    beam: int = 1,
    alpha: float = 0.6,
    batch_tokens: int = 4_000,
    too_long: Callable[[SentenceTooLongError], None] | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """The translation of each sentence; ``beam=1`` decodes greedily, or as ``sampling`` draws,
    from its seed on or from where ``generator`` stands.

    A blank sentence gives an empty one. For a sentence beyond the model's length limit
    ``too_long`` is called with the error, and its translation is empty; without it, the first such
    sentence raises SentenceTooLongError before any work.
    """
    if sampling is not None and beam > 1:
        raise ValueError(f"beam: expected 1 beside sampling, got {beam}")
    if sampling is not None and generator is None:
        generator = sampling.generator(next(model.parameters()).device)

    def decode(source: Tensor, lengths: Tensor) -> list[str]:
        if sampling is not None:
            outputs = sample(model, source, lengths, sampling, generator)
        elif beam == 1:
            outputs = greedy(model, source, lengths)
        else:
            outputs = beam_search(model, source, lengths, beam, alpha)
        return tokenizer.decode(outputs)

    found = _in_batches(model, tokenizer, sentences, decode, batch_tokens // max(1, beam), too_long)
    return ["" if translation is None else translation for translation in found]


def translate_n_best(
    model: TranslationModel,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    count: int,
    beam: int = 4,
    alpha: float = 0.6,
    batch_tokens: int = 4_000,
    too_long: Callable[[SentenceTooLongError], None] | None = None,
) -> list[list[tuple[str, float]]]:
    """Each sentence's ``count`` best translations of a beam search, with their scores.

    None for a blank sentence or one that is too long; the rest as in `translate` and `n_best`.
    """

    def decode(source: Tensor, lengths: Tensor) -> list[list[tuple[str, float]]]:
        found = n_best(model, source, lengths, beam, alpha, count)
        return [
            list(zip(tokenizer.decode([each.tokens for each in best]), _scores(best), strict=True))
            for best in found
        ]

    found = _in_batches(model, tokenizer, sentences, decode, batch_tokens // max(1, beam), too_long)
    return [best or [] for best in found]


def _scores(found: Sequence[Hypothesis]) -> list[float]:
    return [each.score for each in found]


@constant_weights()
def _in_batches(
    model: TranslationModel,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    decode: Callable[[Tensor, Tensor], list[_T]],
    batch_tokens: int,
    too_long: Callable[[SentenceTooLongError], None] | None,
) -> list[_T | None]:
    """What ``decode`` makes of each sentence; None of one that is blank or too long."""
    if isinstance(sentences, str):
        raise TypeError("sentences: expected a sequence of sentences, got a str")
    limit = model.config.max_length
    device = next(model.parameters()).device
    encoded = [[*ids, EOS] for ids in tokenizer.encode(sentences)]
    found: list[_T | None] = [None] * len(sentences)
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
        size = max(1, batch_tokens // len(encoded[wanted[0]]))
        chosen, wanted = wanted[:size], wanted[size:]
        source, lengths = (each.to(device) for each in pad([encoded[i] for i in chosen]))
        for index, result in zip(chosen, decode(source, lengths), strict=True):
            found[index] = result
    return found


@torch.inference_mode()
def log_likelihoods(
    model: TranslationModel, dataset: Dataset, batch_tokens: int = 4_000
) -> list[tuple[float, int]]:
    """log P of each of the dataset's translations, EOS included, and how many tokens that is of."""
    model.eval()
    device = next(model.parameters()).device
    found = [(0.0, 0)] * len(dataset)
    for indices in dataset.plan(batch_tokens):
        batch = dataset.batch(indices).to(device)
        read = model.read(batch.target_in, model.start(batch.source, batch.source_lengths))
        for row, index in enumerate(indices.tolist()):
            length = int(batch.target_lengths[row])
            logits = model.embedding.logits(read[row, :length]).float()
            log_p = -F.cross_entropy(logits, batch.target_out[row, :length], reduction="sum")
            found[index] = log_p.item(), length
    return found
