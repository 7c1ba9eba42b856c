"""Greedy decoding and beam search against searches that are too simple to be wrong."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rowmax.transformer import (
    Dataset,
    EncoderDecoder,
    ModelConfig,
    Sampling,
    SentenceTooLongError,
    Tokenizer,
    beam_search,
    corpus,
    greedy,
    log_likelihoods,
    n_best,
    sample,
    translate,
    translate_n_best,
)
from rowmax.transformer.data import pad
from rowmax.transformer.decoding import (
    EXTRA_LENGTH,
    _best,
    _blocks,
    _likeliest,
    _log_softmax,
    length_penalty,
)
from rowmax.transformer.tokenizer import BOS, EOS, PAD


def random_model(vocab_size: int, max_length: int, seed: int = 0) -> EncoderDecoder:
    """Untrained, but with answers that end, and differ: the weights of the last norm, drawn at
    random, undo the likeness of what goes in and what comes out that shared embeddings give."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size, 1, 1, d_model=16, heads=2, d_ff=32, dropout=0.1, max_length=max_length
    )
    model = EncoderDecoder(config, "reference")
    with torch.no_grad():
        model.decoder[-1].add_norm_3.weight.normal_(std=2)
    return model


def sources(count: int, vocab_size: int, longest: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return pad([torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths])


def log_probabilities(model, source, sequences) -> list[float]:
    """log P of each sequence as a translation of one sentence (1, Ls), without a cache."""
    model.eval()
    tokens, lengths = pad(sequences)
    target = torch.cat((torch.full((len(tokens), 1), BOS), tokens[:, :-1]), 1)
    with torch.inference_mode():
        rows = source.expand(len(tokens), -1)
        scores = model(rows, torch.full((len(tokens),), source.shape[1]), target).log_softmax(-1)
    each = scores.gather(2, tokens[:, :, None])[:, :, 0]
    return torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], each, 0).sum(1).tolist()


def simple_greedy(model, source, limit) -> list[int]:
    """Run the whole model anew for each token."""
    model.eval()
    tokens = [BOS]
    while len(tokens) <= limit:
        with torch.inference_mode():
            logits = model(source, torch.tensor([source.shape[1]]), torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            return tokens[1:-1]
    return tokens[1:]


@pytest.fixture(scope="module")
def reverser() -> EncoderDecoder:
    """Half taught to write its source backwards, so that its answers end, some of them wrong."""
    model = random_model(12, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for seed in range(60):
        source, lengths = sources(32, 12, 9, seed)
        answers = [row[:n].flip(0).tolist() for row, n in zip(source, lengths, strict=True)]
        target, _ = pad([[BOS, *answer, EOS] for answer in answers])
        logits = model(source, lengths, target[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_greedy(reverser):
    source, lengths = sources(30, 12, 9, seed=100)
    expected = [
        simple_greedy(reverser, source[row : row + 1, :length], 20)
        for row, length in enumerate(lengths)
    ]
    assert greedy(reverser, source, lengths) == expected
    # The case is worth testing: they end, and not all at once.
    assert len({len(tokens) for tokens in expected}) > 3


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all(seed, alpha):
    """Against every sequence of up to 4 tokens from a vocabulary of 6."""
    model = random_model(6, 4, seed)
    source, lengths = sources(3, 6, 4, seed)
    answers = beam_search(model, source, lengths, beam=300, alpha=alpha)
    several = n_best(model, source, lengths, beam=300, alpha=alpha, count=3)
    others = [token for token in range(6) if token != EOS]
    for row, length in enumerate(lengths):
        one = source[row : row + 1, :length]
        finished = [
            [*tokens, EOS] for n in range(4) for tokens in itertools.product(others, repeat=n)
        ]
        cut = [list(tokens) for tokens in itertools.product(others, repeat=4)]
        every = finished + cut
        scores = [
            log_p / length_penalty(len(tokens), alpha)
            for tokens, log_p in zip(every, log_probabilities(model, one, every), strict=True)
        ]
        best = sorted(zip(scores, every, strict=True), reverse=True)[:3]
        expected = [[token for token in tokens if token != EOS] for _, tokens in best]
        assert answers[row] == expected[0]
        assert [hypothesis.tokens for hypothesis in several[row]] == expected
        assert [hypothesis.score for hypothesis in several[row]] == pytest.approx(
            [score for score, _ in best], rel=1e-5
        )


def test_a_wider_beam_finds_likelier_translations(reverser):
    """In the sum over sentences: for a single one it may not."""
    source, lengths = sources(30, 12, 9, seed=101)

    def total(outputs):
        return sum(
            log_probabilities(reverser, source[row : row + 1, : lengths[row]], [ended])[0]
            for row, tokens in enumerate(outputs)
            for ended in [tokens + [EOS] * (len(tokens) < 20)]
        )

    narrow = total(greedy(reverser, source, lengths))
    wide = total(beam_search(reverser, source, lengths, beam=5, alpha=0.0))
    assert wide > narrow


def test_length_penalty():
    """Equation 14 of Wu et al. (2016)."""
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 0.6) == 2**0.6
    assert length_penalty(7, 0.0) == 1


class Chain:
    """In place of a model: each token's successor depends on that token alone."""

    config = ModelConfig(10, max_length=12)

    def __init__(self) -> None:
        """EOS at once with probability 0.6, or else, surely, 3, 4, 5, 6, 7, 8, EOS."""
        self.scores = torch.full((10, 10), -1e9)
        self.scores[BOS, [EOS, 3]] = torch.tensor([0.6, 0.4]).log()
        for token in range(3, 8):
            self.scores[token, token + 1] = 0.0
        self.scores[8, EOS] = 0.0

    def eval(self) -> None:
        pass

    def start(self, *_: torch.Tensor, **__: int) -> Chain:
        return self

    def reorder(self, _: torch.Tensor) -> None:
        pass

    def keep(self, _: torch.Tensor) -> None:
        pass

    def decode(self, tokens: torch.Tensor, _: Chain) -> torch.Tensor:
        return self.scores[tokens]


@pytest.mark.parametrize("alpha, answer", [(0.0, []), (0.5, []), (1.0, [3, 4, 5, 6, 7, 8])])
def test_waits_for_a_longer_answer_that_can_still_win(alpha, answer):
    """log 0.6 = -0.51 against log 0.4 / 2 ** alpha, of which the length penalty is the 2."""
    model: Any = Chain()
    assert beam_search(model, torch.tensor([[3]]), torch.tensor([1]), 2, alpha) == [answer]


@pytest.mark.parametrize("beam", [1, 3])
def test_a_sentence_does_not_depend_on_its_batch(reverser, beam):
    source, lengths = sources(20, 12, 9, seed=102)
    together = beam_search(reverser, source, lengths, beam)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        assert beam_search(reverser, source[one, :length], lengths[one], beam) == [together[row]]


def test_the_length_limit_is_the_sentences_own():
    """Source length + 50, whatever the longest of the batch may reach (section 6.1)."""
    model = random_model(12, 200)
    with torch.no_grad():  # never ends
        model.embedding.weight[EOS] = 0
        model.embedding.weight[:, 0] = 0
        model.embedding.weight[5:, 0] = 9
        model.decoder[-1].add_norm_3.weight.zero_()
        model.decoder[-1].add_norm_3.bias[0] = 1
    source, lengths = pad([[5], [5, 6, 7, 8]])
    for outputs in (greedy(model, source, lengths), beam_search(model, source, lengths, 2)):
        assert [len(tokens) for tokens in outputs] == [1 + EXTRA_LENGTH, 4 + EXTRA_LENGTH]


def test_no_output_beyond_the_models_positions():
    model = random_model(12, 6)
    source, lengths = sources(20, 12, 6)
    for outputs in (greedy(model, source, lengths), beam_search(model, source, lengths, 3)):
        assert max(len(tokens) for tokens in outputs) == 6


def test_a_beam_wider_than_the_vocabulary():
    model = random_model(5, 6)
    source, lengths = sources(2, 5, 4)
    assert len(beam_search(model, source, lengths, beam=40)) == 2


def test_empty_batch():
    model = random_model(12, 20)
    source, lengths = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert greedy(model, source, lengths) == beam_search(model, source, lengths) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"beam": 0}, "beam must be at least 1"),
        ({"alpha": -0.1}, r"alpha: expected 0 to 5, got -0\.1"),
        ({"alpha": float("nan")}, "alpha: expected 0 to 5, got nan"),
        ({"alpha": float("inf")}, "alpha: expected 0 to 5, got inf"),
        ({"alpha": 400.0}, "alpha: expected 0 to 5, got 400"),
    ],
)
def test_bad_arguments(arguments, message):
    model = random_model(12, 20)
    with pytest.raises(ValueError, match=message):
        beam_search(model, *sources(1, 12, 4), **arguments)


@pytest.fixture(scope="module")
def pair_of_model_and_tokenizer() -> tuple[EncoderDecoder, Tokenizer]:
    tokenizer = Tokenizer.train((side for pair in corpus.generate(300) for side in pair), 400)
    return random_model(400, 30), tokenizer


@pytest.mark.parametrize("beam", [1, 2])
def test_translate_keeps_order_and_blank_lines(pair_of_model_and_tokenizer, beam):
    model, tokenizer = pair_of_model_and_tokenizer
    sentences = ["오늘은 5월이에요.", "", "민수는 지금 책을 읽고 있어요.", " \t", "구"]
    together = translate(model, tokenizer, sentences, beam=beam, batch_tokens=60)
    assert together == [translate(model, tokenizer, [each], beam=beam)[0] for each in sentences]
    assert together[1] == together[3] == ""
    assert len(set(together)) == 4
    assert translate(model, tokenizer, [], beam=beam) == []


def test_a_sentence_beyond_the_limit(pair_of_model_and_tokenizer):
    model, tokenizer = pair_of_model_and_tokenizer
    length = len(tokenizer.encode(["구 " * 40])[0]) + 1
    with pytest.raises(SentenceTooLongError, match=f"sentence 2 has {length} tokens, .* most 30"):
        translate(model, tokenizer, ["구", "구 " * 40])


# --- the largest of many scores -------------------------------------------------------------------


def some_scores(rows: int, columns: int, kind: str) -> torch.Tensor:
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    if kind == "equal":
        scores = scores.mul_(2).round_()
    elif kind == "forbidden":
        scores[:, 5:] = float("-inf")
    elif kind == "last":
        scores[:, -1] = 9
    elif kind == "not a number":
        scores[1, 700] = float("nan")
    return scores


@pytest.mark.parametrize("columns", [1024, 1000, 997, 130, 3])
@pytest.mark.parametrize("kind", ["different", "equal", "forbidden", "last", "not a number"])
def test_the_likeliest(kind, columns):
    """The first of equal ones, as argmax has it."""
    scores = some_scores(3, max(columns, 701) if kind == "not a number" else columns, kind)
    assert torch.equal(_likeliest(scores), scores.argmax(-1))


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("columns", [4096, 4000, 3989])
@pytest.mark.parametrize("kind", ["different", "equal", "forbidden", "last"])
def test_the_best(kind, columns, count):
    scores = some_scores(3, columns, kind)
    top, index = _best(scores, count)
    assert torch.equal(top, scores.topk(count).values)
    assert torch.equal(scores.gather(1, index), top)
    assert all(len(set(row)) == count for row in index.tolist())


def test_when_blocks_are_looked_at():
    for columns, count, size in ((8_000, 1, 64), (40_000, 8, 64), (4_700, 1, 94)):
        blocks = _blocks(torch.zeros(2, columns), count)
        assert blocks is not None
        assert blocks.shape == (2, columns // size, size)
    for scores in (torch.zeros(2, 9_973), torch.zeros(2, 250), torch.zeros(2, 8_000).to("meta")):
        assert _blocks(scores, 1) is None
    assert _blocks(torch.zeros(2, 8_000), 32) is None


@pytest.mark.parametrize("shape", [(2, 3, 8_000), (64, 2, 1_000), (1, 1, 7), (300, 4, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_softmax_in_place(shape, dtype):
    logits = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).mul_(5)
    expected = logits.log_softmax(-1)
    assert _log_softmax(logits) is logits
    assert torch.equal(logits, expected)


# --- sampling, n-best and scores ------------------------------------------------------------------


def test_sampling_of_the_likeliest_token_is_greedy(reverser):
    source, lengths = sources(20, 12, 9, seed=103)
    expected = greedy(reverser, source, lengths)
    cold = (Sampling(temperature=temperature) for temperature in (1e-4, 1e-40, 5e-324))
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), *cold):
        assert sample(reverser, source, lengths, sampling) == expected


def test_samples_follow_from_the_seed(reverser):
    source, lengths = sources(20, 12, 9, seed=103)
    first, again, other = (
        sample(reverser, source, lengths, Sampling(temperature=2.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "sampling, allowed",
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [0.25, 0.0625, 0.0225, 0.01]),
        (Sampling(top_k=2), [0.5, 0.25, 0.0, 0.0]),
        (Sampling(top_k=9), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(top_p=0.5), [0.5, 0.0, 0.0, 0.0]),
        (Sampling(top_p=0.51), [0.5, 0.25, 0.0, 0.0]),
        (Sampling(top_p=0.9), [0.5, 0.25, 0.15, 0.0]),
        (Sampling(top_k=3, top_p=0.6), [0.5, 0.25, 0.0, 0.0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling, allowed):
    """Frequencies of 20,000 draws, each within five standard deviations."""
    count, p = 20_000, torch.tensor([0.15, 0.5, 0.1, 0.25])
    drawn = sampling.pick(p.log().expand(count, -1), sampling.generator(torch.device("cpu")))
    expected = torch.tensor(allowed)[[2, 0, 3, 1]].double()
    expected /= expected.sum()
    found = drawn.bincount(minlength=4) / count
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": 0.0}, "temperature.*> 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k.*at least 1"),
        ({"top_p": 0.0}, "top_p.*0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
    ],
)
def test_wrong_sampling(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_translating_by_sampling_and_n_best(pair_of_model_and_tokenizer):
    model, tokenizer = pair_of_model_and_tokenizer
    sentences = ["ab", "", "a"]
    assert translate(model, tokenizer, sentences, sampling=Sampling(top_k=1)) == translate(
        model, tokenizer, sentences
    )
    several = translate_n_best(model, tokenizer, sentences, 3, beam=3)
    assert [len(best) for best in several] == [3, 0, 3]
    assert [best[0][0] if best else "" for best in several] == translate(
        model, tokenizer, sentences, beam=3
    )
    for best in several:
        scores = [score for _, score in best]
        assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match="beam: expected 1 beside sampling"):
        translate(model, tokenizer, sentences, beam=2, sampling=Sampling())


def test_arguments_of_translate_that_can_not_be(pair_of_model_and_tokenizer):
    model, tokenizer = pair_of_model_and_tokenizer
    with pytest.raises(TypeError, match="sentences: .* got a str"):
        translate(model, tokenizer, "ab")
    with pytest.raises(ValueError, match="beam must be at least 1"):
        translate(model, tokenizer, ["ab"], beam=0)
    with pytest.raises(ValueError, match="beam must be at least 1"):
        translate_n_best(model, tokenizer, ["ab"], 1, beam=0)


def test_more_of_the_best_than_beams(reverser):
    with pytest.raises(ValueError, match="count: expected 1 to the beam's 2, got 3"):
        n_best(reverser, torch.tensor([[3]]), torch.tensor([1]), beam=2, count=3)


def test_log_likelihoods(reverser):
    """The decoder's own scores, in batches of several lengths."""
    pairs = [("a b", "b a"), ("c", "c d e f"), ("a b c d", "b")]
    tokenizer = Tokenizer.train((side for pair in pairs for side in pair), 300)
    model = random_model(tokenizer.vocab_size, 40)
    dataset = Dataset(pairs, tokenizer, 40)
    found = log_likelihoods(model, dataset, batch_tokens=20)
    for (log_p, tokens), source, target in zip(
        found, dataset.sources, dataset.targets, strict=True
    ):
        (expected,) = log_probabilities(model, torch.tensor([source]), [target])
        assert log_p == pytest.approx(expected, rel=1e-5)
        assert tokens == len(target)


def test_a_model_of_nan_is_told_in_a_sentence() -> None:
    model = random_model(64, 20)
    with torch.no_grad():
        model.embedding.weight[5] = float("nan")
    source, lengths = sources(2, 64, 6)
    with pytest.raises(ValueError, match="sentence 1: the model gives no token a score but NaN"):
        beam_search(model, source, lengths)
