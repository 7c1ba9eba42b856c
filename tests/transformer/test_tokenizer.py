"""The subword tokenizer: whatever goes in comes out."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

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


_PADDING = {
    "strategy": {"Fixed": 10**13},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 77_777,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "X", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"X": {"id": "X", "ids": [999_999], "tokens": ["X"]}},
}
_TRUNCATION = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}


@pytest.mark.parametrize(
    "part, value",
    [
        ("padding", _PADDING),
        ("padding", {**_PADDING, "strategy": "BatchLongest"}),
        ("padding", {"type": None}),
        ("post_processor", _TEMPLATE),
        ("truncation", _TRUNCATION),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("decoder", None),
        ("normalizer", None),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1000}),
        ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "<pad>"}),
        ("model", None),
    ],
)
def test_parts_of_other_tokenizers(part: str, value: Any):
    """Refused before the library builds it: padding to a length of 10**13 would abort the process,
    and ids from a template or of padding lie beyond the vocabulary."""
    content = {**json.loads(_TRAINED.to_json()), part: value}
    with pytest.raises(ValueError, match=f"of rowmax.transformer: its {part} is ") as caught:
        Tokenizer.from_json(json.dumps(content))
    assert len(str(caught.value)) < 200


def test_a_model_with_other_settings():
    content = json.loads(_TRAINED.to_json())
    content["model"]["dropout"] = 0.5
    with pytest.raises(ValueError, match=r"its model has 'dropout' 0\.5"):
        Tokenizer.from_json(json.dumps(content))


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match=f"at least {SMALLEST_VOCABULARY} .* got 258"):
        Tokenizer.train(["a"], 258)
