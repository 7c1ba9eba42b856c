"""The subword tokenizer: whatever goes in comes out."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowmax.transformer import Tokenizer, corpus
from rowmax.transformer.tokenizer import BOS, EOS, PAD, SMALLEST_VOCABULARY


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((side for pair in corpus.generate(2_000) for side in pair), 600)


_TRAINED = Tokenizer.train(["the cat sat", "고양이가 앉았어요"], 300)


@given(st.text())
def test_any_text_comes_back(text):
    """Up to Unicode's canonical composition, which is part of the encoding."""
    ids = _TRAINED.encode([text])
    assert _TRAINED.decode(ids) == [unicodedata.normalize("NFC", text)]
    assert not {PAD, BOS, EOS} & set(ids[0])


@pytest.mark.parametrize("text", ["</s>", "a <pad> b", "<s>"])
def test_text_that_looks_like_a_special_token_stays_text(tokenizer, text):
    ids = tokenizer.encode([text])
    assert not {PAD, BOS, EOS} & set(ids[0])
    assert tokenizer.decode(ids) == [text]


def test_decomposed_hangul_is_the_same_as_composed(tokenizer):
    text = "민수는 책을 읽어요."
    assert tokenizer.encode([unicodedata.normalize("NFD", text)]) == tokenizer.encode([text])


def test_special_tokens_are_left_out_of_the_text(tokenizer):
    ids = tokenizer.encode(["three"])[0]
    assert tokenizer.decode([[BOS, *ids, EOS, PAD]]) == ["three"]


def test_a_word_is_the_same_token_at_the_start_and_within(tokenizer):
    start, within = tokenizer.encode(["three", "three three"])
    assert within == start * 2


def test_a_cut_character_does_not_raise(tokenizer):
    ids = tokenizer.encode(["퀰"])[0]
    assert "\ufffd" in tokenizer.decode([ids[:-1]])[0]


def test_json_round_trip(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    sentences = [side for pair in corpus.generate(50, seed=3) for side in pair]
    assert again.encode(sentences) == tokenizer.encode(sentences)
    assert again.vocab_size == tokenizer.vocab_size == 600


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"version": "1.0"}'])
def test_what_is_no_tokenizer(text):
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.from_json(text)


def test_a_foreign_tokenizer(tokenizer):
    foreign = tokenizer.to_json().replace("<pad>", "<unk>")
    with pytest.raises(ValueError, match="not a tokenizer of rowmax.transformer: <pad>"):
        Tokenizer.from_json(foreign)


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match=f"at least {SMALLEST_VOCABULARY} .* got 258"):
        Tokenizer.train(["a"], 258)
