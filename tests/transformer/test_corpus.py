"""The built-in corpus: Korean spelling, numerals, and what makes exact match a fair score."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowmax.transformer import corpus, korean, lexicon

from ..processes import printed


@pytest.mark.parametrize(
    "particle, expected",
    [
        (korean.topic, ["학생은", "의사는", "하늘은"]),
        (korean.subject, ["학생이", "의사가", "하늘이"]),
        (korean.direct_object, ["학생을", "의사를", "하늘을"]),
        (korean.together_with, ["학생과", "의사와", "하늘과"]),
        (korean.by_means_of, ["학생으로", "의사로", "하늘로"]),  # 로 after ㄹ too
        (korean.is_, ["학생이에요", "의사예요", "하늘이에요"]),
    ],
)
def test_a_particle_follows_the_final_consonant(particle, expected):
    assert [particle(word) for word in ("학생", "의사", "하늘")] == expected


def test_a_particle_needs_a_hangul_syllable():
    with pytest.raises(ValueError, match="'cat' does not end in a Hangul syllable"):
        korean.topic("cat")


# Forms as a Korean grammar lists them: past, future, ability.
FORMS = {
    "read": ("읽었어요", "읽을 거예요", "읽을 수 있어요"),
    "write": ("썼어요", "쓸 거예요", "쓸 수 있어요"),
    "drink": ("마셨어요", "마실 거예요", "마실 수 있어요"),
    "buy": ("샀어요", "살 거예요", "살 수 있어요"),
    "sell": ("팔았어요", "팔 거예요", "팔 수 있어요"),
    "watch": ("봤어요", "볼 거예요", "볼 수 있어요"),
    "listen to": ("들었어요", "들을 거예요", "들을 수 있어요"),
    "make": ("만들었어요", "만들 거예요", "만들 수 있어요"),
    "learn": ("배웠어요", "배울 거예요", "배울 수 있어요"),
    "open": ("열었어요", "열 거예요", "열 수 있어요"),
    "like": ("좋아했어요", "좋아할 거예요", "좋아할 수 있어요"),
}


def test_verb_endings():
    verbs = {verb.english[0]: verb for verb, _ in lexicon.ACTIONS}
    for english, forms in FORMS.items():
        verb = verbs[english]
        assert (verb.past(), verb.future(), verb.ability()) == forms
    assert (lexicon.GO.past(), lexicon.COME.past()) == ("갔어요", "왔어요")


@pytest.mark.parametrize(
    "number, sino, english",
    [
        (0, "영", "zero"),
        (7, "칠", "seven"),
        (10, "십", "ten"),
        (11, "십일", "eleven"),
        (110, "백십", "one hundred ten"),
        (1_001, "천일", "one thousand one"),
        (10_000, "만", "ten thousand"),
        (12_500, "만 이천오백", "twelve thousand five hundred"),
        (110_000, "십일만", "one hundred ten thousand"),
        (
            938_676,
            "구십삼만 팔천육백칠십육",
            "nine hundred thirty-eight thousand six hundred seventy-six",
        ),
        (20_000_020, "이천만 이십", "twenty million twenty"),
    ],
)
def test_numerals(number, sino, english):
    assert korean.sino(number) == sino
    assert corpus.english_number(number) == english


def read_sino(words: str) -> int:
    """The value of a Sino-Korean numeral, by reading it from left to right."""
    digits = {name: value for value, name in enumerate("영일이삼사오육칠팔구")}
    total = section = digit = 0
    for letter in words.replace(" ", ""):
        if letter in digits:
            digit = digits[letter]
        elif letter == "만":
            total, section, digit = (section + digit or 1) * 10_000, 0, 0
        else:
            section, digit = section + (digit or 1) * {"십": 10, "백": 100, "천": 1000}[letter], 0
    return total + section + digit


def read_english(words: str) -> int:
    """The value of an English numeral, by reading it from left to right."""
    units = dict(zip(corpus._ONES, range(20), strict=True))
    units |= {ten: 10 * value for value, ten in enumerate(corpus._TENS)}
    total = section = 0
    for word in words.replace("-", " ").split():
        if word == "hundred":
            section *= 100
        elif word in ("thousand", "million"):
            total, section = total + section * {"thousand": 1000, "million": 10**6}[word], 0
        else:
            section += units[word]
    return total + section


@given(st.integers(0, 99_999_999))
def test_numerals_read_back(number):
    assert read_sino(korean.sino(number)) == number
    assert read_english(corpus.english_number(number)) == number


def test_native_numerals():
    assert [korean.native(n) for n in (1, 3, 11, 20, 21, 99)] == [
        *("한", "세", "열한", "스무", "스물한", "아흔아홉")
    ]


@pytest.mark.parametrize("make", [korean.sino, corpus.english_number, korean.native])
@pytest.mark.parametrize("number", [-1, 100_000_000])
def test_numbers_out_of_range(make, number):
    with pytest.raises(ValueError, match="number must be from"):
        make(number)


def test_every_korean_sentence_has_one_english_target():
    """Also when the grammar draws it again, which `generate` would hide."""
    import random

    grammar = corpus._Grammar(random.Random(5))
    targets: dict[str, str] = {}
    for _ in range(100_000):
        pair = grammar.draw()
        assert targets.setdefault(pair.korean, pair.english) == pair.english


def test_no_word_stands_for_two_things():
    for words in (
        [(thing.korean, thing.one) for _, things in lexicon.ACTIONS for thing in things],
        [(person.korean, person.english) for person in lexicon.PEOPLE],
        [(ko, en) for ko, en, _ in lexicon.PLACES],
        list(lexicon.ADJECTIVES),
        [when for kind in lexicon.WHEN.values() for when in kind],
    ):
        distinct = set(words)
        assert len({ko for ko, _ in distinct}) == len(distinct)


def test_splits_are_large_distinct_and_disjoint():
    splits = corpus.splits()
    sources = [pair.korean for split in splits for pair in split]
    assert [len(split) for split in splits] == [200_000, 1_000, 1_000]
    assert len(set(sources)) == len(sources)


def test_held_out_pairs_do_not_depend_on_the_size_of_training():
    small, large = corpus.splits(train=0), corpus.splits(train=2_000)
    assert (small.test, small.validation) == (large.test, large.validation)


def test_seeds():
    assert corpus.generate(300, seed=1) == corpus.generate(500, seed=1)[:300]
    assert corpus.generate(300, seed=1) != corpus.generate(300, seed=2)
    with pytest.raises(ValueError, match="count must not be negative"):
        corpus.generate(-1)


def test_the_same_pairs_in_another_process():
    """Not dependent on PYTHONHASHSEED, say."""
    code = "from rowmax.transformer import corpus; print(ascii(corpus.generate(200)))"
    assert printed("-c", code) == ascii(corpus.generate(200)) + "\n"


def test_sentences_are_well_formed():
    for pair in corpus.generate(20_000):
        assert "  " not in pair.korean + pair.english
        assert ".." not in pair.english
        assert pair.english.isascii()
        # A question stays one, a statement too.
        assert pair.korean.endswith("?") == pair.english.endswith("?")
