"""Korean spelling: particles, verb endings and numerals.

A Hangul syllable is one code point, ``0xAC00 + (initial * 21 + vowel) * 28 + final``, so a
particle's form (chosen by whether the word before it ends in a consonant) and most verb
endings are arithmetic on the last code point.
"""

from __future__ import annotations

from dataclasses import dataclass

_FIRST, _LAST = 0xAC00, 0xD7A3
_FINALS = 28
_RIEUL, _SSANG_SIOT = 8, 20  # the final consonants ㄹ and ㅆ


def _final(word: str) -> int:
    """Index of the final consonant of the word's last syllable, 0 if it ends in a vowel."""
    code = ord(word[-1])
    if not _FIRST <= code <= _LAST:
        raise ValueError(f"{word!r} does not end in a Hangul syllable, so no particle form follows")
    return (code - _FIRST) % _FINALS


def _with_final(word: str, final: int) -> str:
    """The word with a final consonant put under its last syllable, which must end in a vowel."""
    return word[:-1] + chr(ord(word[-1]) + final)


def topic(word: str) -> str:
    """``word`` with the topic particle: 학생은, 의사는."""
    return word + ("은" if _final(word) else "는")


def subject(word: str) -> str:
    """``word`` with the subject particle: 책이, 의자가."""
    return word + ("이" if _final(word) else "가")


def direct_object(word: str) -> str:
    """``word`` with the object particle: 책을, 의자를."""
    return word + ("을" if _final(word) else "를")


def together_with(word: str) -> str:
    """``word`` with the particle for company: 동생과, 친구와."""
    return word + ("과" if _final(word) else "와")


def by_means_of(word: str) -> str:
    """``word`` with the particle for means: 트럭으로, 버스로; after ㄹ 로: 지하철로."""
    return word + ("으로" if _final(word) not in (0, _RIEUL) else "로")


def is_(word: str) -> str:
    """``word`` with the polite copula: 책이에요, 의자예요."""
    return word + ("이에요" if _final(word) else "예요")


@dataclass(frozen=True)
class Verb:
    """A Korean verb with its English forms.

    ``stem`` is the dictionary form less 다, ``joined`` the form before 요 (읽어), which
    always ends in a vowel, and ``irregular`` the form before 거예요 (들을) where no rule
    gives it. ``english`` holds the base form, third person, past and -ing form.
    """

    stem: str
    joined: str
    english: tuple[str, str, str, str]
    irregular: str = ""
    stative: bool = False

    def present(self) -> str:
        return self.joined + "요"

    def past(self) -> str:
        return _with_final(self.joined, _SSANG_SIOT) + "어요"

    def prospective(self) -> str:
        """The ㄹ form: 읽을, 마실, 만들."""
        if self.irregular:
            return self.irregular
        final = _final(self.stem)
        if final == 0:
            return _with_final(self.stem, _RIEUL)
        return self.stem if final == _RIEUL else self.stem + "을"

    def future(self) -> str:
        return self.prospective() + " 거예요"

    def ability(self) -> str:
        return self.prospective() + " 수 있어요"

    def progressive(self) -> str:
        return self.stem + "고 있어요"

    def wish(self) -> str:
        return self.stem + "고 싶어요"

    def negated(self) -> str:
        return self.stem + "지 않아요"

    def linked(self) -> str:
        """The form that joins a second verb: 읽고."""
        return self.stem + "고"


_SINO_DIGITS = ("", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")
_SINO_PLACES = ((1000, "천"), (100, "백"), (10, "십"))
_NATIVE_ONES = ("", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")
_NATIVE_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")


def _sino_below_10000(number: int) -> str:
    words = ""
    for place, name in _SINO_PLACES:
        digit, number = divmod(number, place)
        if digit:
            words += ("" if digit == 1 else _SINO_DIGITS[digit]) + name  # 백, not 일백
    return words + _SINO_DIGITS[number]


def sino(number: int) -> str:
    """A Sino-Korean numeral, spaced at the ten thousands: 12500 is 만 이천오백."""
    if not 0 <= number < 100_000_000:
        raise ValueError(f"number must be from 0 to 99,999,999, got {number}")
    if number == 0:
        return "영"
    high, low = divmod(number, 10_000)
    words = []
    if high:
        words.append(("" if high == 1 else _sino_below_10000(high)) + "만")  # 만, not 일만
    if low:
        words.append(_sino_below_10000(low))
    return " ".join(words)


def native(number: int) -> str:
    """A native Korean numeral as it stands before a counter: 21 is 스물한, 20 is 스무."""
    if not 1 <= number <= 99:
        raise ValueError(f"number must be from 1 to 99, got {number}")
    if number == 20:
        return "스무"
    tens, ones = divmod(number, 10)
    return _NATIVE_TENS[tens] + _NATIVE_ONES[ones]
