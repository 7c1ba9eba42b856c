"""The built-in Korean-English corpus, made by a grammar of everyday phrases.

Numbers, dates, times, prices and short sentences. Korean puts the time first, the verb last
and marks each noun's part with a particle; English goes subject, verb, object, place, time;
Korean groups numbers by ten thousands, English by thousands. So nearly nothing can be
translated word by word, and a model has to attend to the right places.

The same seed gives the same pairs in the same order on every machine. Every Korean sentence
has exactly one English target.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import NamedTuple, TypeVar

from . import korean, lexicon
from .korean import Verb
from .lexicon import Person, Thing

_T = TypeVar("_T")


class Pair(NamedTuple):
    """One sentence in both languages."""

    korean: str
    english: str


class Splits(NamedTuple):
    """Three lists with no Korean sentence in common."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def english_number(number: int) -> str:
    """An English cardinal: 12500 is 'twelve thousand five hundred'."""
    if not 0 <= number < 100_000_000:
        raise ValueError(f"number must be from 0 to 99,999,999, got {number}")
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    for place, name in ((1_000_000, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= place:
            high, low = divmod(number, place)
            return f"{english_number(high)} {name}" + (f" {english_number(low)}" if low else "")
    raise AssertionError("unreachable: every number from 100 has a place")


def _sentence(text: str, mark: str = ".") -> str:
    """An English sentence; one full stop is enough after "a.m." too."""
    return text[0].upper() + text[1:] + ("" if text.endswith(".") and mark == "." else mark)


class _Grammar:
    """Draws pairs from the grammar with one random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        # Each family with its share of the corpus.
        self.families: tuple[tuple[Callable[[], Pair], float], ...] = (
            (self.number, 0.10),
            (self.calendar_date, 0.09),
            (self.clock_time, 0.08),
            (self.price, 0.12),
            (self.action, 0.38),
            (self.journey, 0.11),
            (self.two_actions, 0.07),
            (self.existence, 0.05),
        )

    def draw(self) -> Pair:
        makers, shares = zip(*self.families, strict=True)
        return self.rng.choices(makers, shares)[0]()

    def pick(self, items: Sequence[_T]) -> _T:
        return items[int(self.rng.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # Numbers, dates, times, prices.

    def amount(self) -> int:
        """A number whose length, not only whose value, is spread evenly; of those below 100
        there are too few to learn them without the ones that are tested."""
        digits = self.pick((3, 4, 5))
        return self.rng.randrange(10 ** (digits - 1), 10**digits)

    def number(self) -> Pair:
        value = self.amount()
        ko, en = korean.sino(value), english_number(value)
        if self.chance(0.5):
            return Pair(ko, en)
        return Pair(f"정답은 {korean.is_(ko)}.", f"The answer is {en}.")

    def calendar_date(self) -> Pair:
        day = date(1950, 1, 1) + timedelta(days=self.rng.randrange(100 * 365))
        ko = f"{day.month}월 {day.day}일"
        en = f"{lexicon.MONTHS[day.month - 1]} {day.day}"
        if self.chance(0.8):
            ko, en = f"{day.year}년 {ko}", f"{en}, {day.year}"
        if self.chance(0.5):
            weekday_ko, weekday_en = lexicon.WEEKDAYS[day.weekday()]
            ko, en = f"{ko} {weekday_ko}", f"{weekday_en}, {en}"
        frame = self.pick(("bare", "today", "birthday"))
        if frame == "today":
            return Pair(f"오늘은 {korean.is_(ko)}.", f"Today is {en}.")
        if frame == "birthday":
            person = self.pick(lexicon.COMPANIONS)
            return Pair(
                f"{person.korean}의 생일은 {korean.is_(ko)}.",
                _sentence(f"{person.english}'s birthday is {en}"),
            )
        return Pair(ko, en)

    def _time_of_day(self) -> tuple[str, str]:
        """A clock time: 오후 세 시 이십 분, 3:20 p.m."""
        half, suffix = self.pick((("오전", "a.m."), ("오후", "p.m.")))
        hour, minute = self.rng.randrange(1, 13), 5 * self.rng.randrange(12)
        ko = f"{half} {korean.native(hour)} 시"
        if minute == 30:
            ko += " 반"  # half past, the usual form
        elif minute:
            ko += f" {korean.sino(minute)} 분"
        return ko, f"{hour}:{minute:02} {suffix}"

    def clock_time(self) -> Pair:
        ko, en = self._time_of_day()
        frame = self.pick(("now", "start", "leave", "meet"))
        if frame == "now":
            return Pair(f"지금은 {korean.is_(ko)}.", _sentence(f"it is now {en}"))
        if frame == "start":
            event_ko, event_en = self.pick(lexicon.EVENTS)
            return Pair(
                f"{korean.topic(event_ko)} {ko}에 시작해요.",
                _sentence(f"the {event_en} starts at {en}"),
            )
        if frame == "leave":
            vehicle_ko, vehicle_en = self.pick(lexicon.SCHEDULED)
            place_ko, place_en, _ = self.pick(lexicon.PLACES)
            return Pair(
                f"{place_ko}에 가는 {korean.topic(vehicle_ko)} {ko}에 출발해요.",
                _sentence(f"the {vehicle_en} to {place_en} leaves at {en}"),
            )
        place_ko, place_en, at = self.pick(lexicon.PLACES)
        return Pair(
            f"{ko}에 {place_ko}에서 만나요.", _sentence(f"let's meet {at} {place_en} at {en}")
        )

    def _counted(self, thing: Thing) -> tuple[str, str, int]:
        """A number of things: 사과 세 개, three apples."""
        number = self.rng.randrange(1, 13)
        return (
            f"{thing.korean} {korean.native(number)} {thing.counter}",
            thing.counted(number, english_number(number)),
            number,
        )

    def price(self) -> Pair:
        value = self.rng.randrange(1, 1000) * self.pick((10, 100, 500, 1000))
        won_ko, won_en = f"{korean.sino(value)} 원", f"{english_number(value)} won"
        thing = self.pick(lexicon.GOODS)
        if self.chance(0.5):
            adjective_ko, adjective_en = self.pick(lexicon.ADJECTIVES) if thing.many else ("", "")
            this_ko = " ".join(filter(None, ("이", adjective_ko, thing.korean)))
            this_en = " ".join(filter(None, ("this", adjective_en, thing.bare())))
            return Pair(
                f"{korean.topic(this_ko)} {won_ko}이에요.", _sentence(f"{this_en} costs {won_en}")
            )
        counted_ko, counted_en, number = self._counted(thing)
        cost = "costs" if number == 1 else "cost"
        return Pair(
            f"{korean.topic(counted_ko)} {won_ko}이에요.",
            _sentence(f"{counted_en} {cost} {won_en}"),
        )

    # Sentences: subject-object-verb becomes subject-verb-object.

    def _object(self, thing: Thing) -> tuple[str, str]:
        """A thing as an object: plain, with an adjective, or counted."""
        if thing.many and self.chance(0.3):
            adjective_ko, adjective_en = self.pick(lexicon.ADJECTIVES)
            article = "an" if adjective_en[0] in "aeiou" else "a"
            return f"{adjective_ko} {thing.korean}", f"{article} {adjective_en} {thing.bare()}"
        if thing.counter and self.chance(0.3):
            return self._counted(thing)[:2]
        return thing.korean, thing.one

    def _predicate(self, who: Person, verb: Verb, question: bool) -> tuple[str, str, str]:
        """The verb in some tense: the Korean verb, English subject and verb, what times fit.

        A question has the auxiliary before the subject: "did Minsu read".
        """
        base, third, past, ing = verb.english
        do = "does" if who.third else "do"
        # Korean verb, English verb of a statement, the two parts of a question's, kind of time.
        tenses = [
            (verb.present(), third if who.third else base, (do, base), "present"),
            (verb.past(), past, ("did", base), "past"),
        ]
        if not verb.stative:
            tenses += [
                (verb.future(), f"will {base}", ("will", base), "future"),
                (verb.progressive(), f"{who.be} {ing}", (who.be, ing), "now"),
                (verb.ability(), f"can {base}", ("can", base), "future"),
            ]
        if not question:
            tenses.append((verb.negated(), f"{do} not {base}", ("", ""), "present"))
            # Korean tells the speaker's wishes so, those of others with another ending.
            if not verb.stative and who in lexicon.SPEAKERS:
                tenses.append((verb.wish(), f"want to {base}", ("", ""), "future"))
        verb_ko, plain, (auxiliary, rest), kind = self.pick(tenses)
        if question:
            return verb_ko, f"{auxiliary} {who.english} {rest}", kind
        return verb_ko, f"{who.english} {plain}", kind

    def _when(self, kind: str) -> tuple[str, str]:
        """A time that fits the tense, empty half of the time."""
        if self.chance(0.45):
            return "", ""
        if kind == "now" or self.chance(0.6):
            return self.pick(lexicon.WHEN[kind])
        if self.chance(0.4):
            ko, en = self.pick(lexicon.WEEKDAYS)
            return f"{ko}에", f"on {en}"
        if self.chance(0.5):
            month, day = self.rng.randrange(1, 13), self.rng.randrange(1, 29)
            return f"{month}월 {day}일에", f"on {lexicon.MONTHS[month - 1]} {day}"
        ko, en = self._time_of_day()
        return f"{ko}에", f"at {en}"

    def _joined(
        self, korean_parts: Sequence[str], english_parts: Sequence[str], question: bool = False
    ) -> Pair:
        """A sentence of those parts that aren't empty."""
        mark = "?" if question else "."
        return Pair(
            " ".join(filter(None, korean_parts)) + mark,
            _sentence(" ".join(filter(None, english_parts)), mark),
        )

    def _companion(self, who: Person) -> tuple[str, str]:
        other = self.pick(lexicon.COMPANIONS)
        if other is who or self.chance(0.75):
            return "", ""
        return korean.together_with(other.korean), f"with {other.english}"

    def _scene(self) -> tuple[str, str]:
        if self.chance(0.5):
            return "", ""
        ko, en, at = self.pick(lexicon.PLACES)
        return f"{ko}에서", f"{at} {en}"

    def action(self) -> Pair:
        who = self.pick(lexicon.PEOPLE)
        verb, things = self.pick(lexicon.ACTIONS)
        object_ko, object_en = self._object(self.pick(things))
        question = self.chance(0.2)
        verb_ko, verb_en, kind = self._predicate(who, verb, question)
        time_ko, time_en = self._when(kind)
        company_ko, company_en = ("", "") if verb.stative else self._companion(who)
        scene_ko, scene_en = ("", "") if verb.stative else self._scene()
        return self._joined(
            (
                time_ko,
                korean.topic(who.korean),
                company_ko,
                scene_ko,
                korean.direct_object(object_ko),
                verb_ko,
            ),
            (verb_en, object_en, company_en, scene_en, time_en),
            question,
        )

    def journey(self) -> Pair:
        who = self.pick(lexicon.PEOPLE)
        verb = self.pick((lexicon.GO, lexicon.COME))
        place_ko, place_en, _ = self.pick(lexicon.PLACES)
        question = self.chance(0.2)
        verb_ko, verb_en, kind = self._predicate(who, verb, question)
        time_ko, time_en = self._when(kind)
        company_ko, company_en = self._companion(who)
        by_ko, by_en = "", ""
        if self.chance(0.6):
            vehicle_ko, vehicle_en = self.pick(lexicon.VEHICLES)
            by_ko, by_en = korean.by_means_of(vehicle_ko), f"by {vehicle_en}"
        return self._joined(
            (time_ko, korean.topic(who.korean), company_ko, by_ko, f"{place_ko}에", verb_ko),
            (verb_en, f"to {place_en}", company_en, by_en, time_en),
            question,
        )

    def two_actions(self) -> Pair:
        """Two verbs of one subject; the Korean tense stands on the last one only."""
        who = self.pick(lexicon.PEOPLE)
        first, second = self.pick(_ACTIVE), self.pick(_ACTIVE)
        object1_ko, object1_en = self._object(self.pick(first[1]))
        object2_ko, object2_en = self._object(self.pick(second[1]))
        if self.chance(0.5):
            last_ko, form, kind = second[0].past(), 2, "past"
        else:
            last_ko, form, kind = second[0].present(), 1 if who.third else 0, "present"
        time_ko, time_en = self._when(kind)
        subject_ko = korean.topic(who.korean)
        part1_ko = f"{korean.direct_object(object1_ko)} {first[0].linked()}"
        part2_ko = f"{korean.direct_object(object2_ko)} {last_ko}"
        part1_en = f"{first[0].english[form]} {object1_en}"
        part2_en = f"{second[0].english[form]} {object2_en}"
        return self._joined(
            (time_ko, subject_ko, part1_ko, part2_ko),
            (who.english, part1_en, "and", part2_en, time_en),
        )

    def existence(self) -> Pair:
        """What is where, with the subject particle: 교실에 의자가 세 개 있어요."""
        place_ko, place_en, at = self.pick(lexicon.PLACES)
        thing = self.pick(lexicon.OBJECTS)
        what_ko = f"{place_ko}에 {korean.subject(thing.korean)}"
        if self.chance(0.3):
            return Pair(f"{what_ko} 있어요.", f"There is {thing.one} {at} {place_en}.")
        number = self.rng.randrange(1, 100)
        be = "is" if number == 1 else "are"
        counted_en = thing.counted(number, english_number(number))
        return Pair(
            f"{what_ko} {korean.native(number)} {thing.counter} 있어요.",
            f"There {be} {counted_en} {at} {place_en}.",
        )


_ACTIVE = tuple(entry for entry in lexicon.ACTIONS if not entry[0].stative)


def generate(count: int, seed: int = 0) -> list[Pair]:
    """``count`` pairs with distinct Korean sides, the same list for the same seed.

    A longer list starts with the shorter one.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    grammar = _Grammar(random.Random(seed))
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        pair = grammar.draw()
        pairs.setdefault(pair.korean, pair)
    return list(pairs.values())


def splits(
    train: int = 200_000, validation: int = 1_000, test: int = 1_000, seed: int = 2017
) -> Splits:
    """Disjoint training, validation and test pairs; the two latter don't depend on ``train``."""
    held_out = validation + test
    pairs = generate(held_out + train, seed)
    return Splits(train=pairs[held_out:], validation=pairs[test:held_out], test=pairs[:test])
