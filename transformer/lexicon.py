"""The words of the built-in corpus: one English rendering for each Korean word.

That no Korean word has two renderings, and no two English senses share a Korean word in the
same place of a sentence, is what makes every Korean sentence of the grammar have exactly one
English target, so that exact match is a fair score.
"""

from __future__ import annotations

from dataclasses import dataclass

from .korean import Verb


@dataclass(frozen=True)
class Person:
    """Someone who can be a sentence's subject. ``third`` tells whether English adds -s."""

    korean: str
    english: str
    third: bool = True
    be: str = "is"


@dataclass(frozen=True)
class Thing:
    """A noun. ``one`` is its English form with article, ``many`` its plural (empty for mass nouns).

    ``counter`` is the Korean counting word; ``measure`` is set where English counts by a
    measure as well ("two cups of coffee") and holds its singular and plural.
    """

    korean: str
    one: str
    many: str = ""
    counter: str = ""
    measure: tuple[str, str] = ("", "")

    def counted(self, number: int, word: str) -> str:
        """English for ``number`` of this thing, the number written as ``word``."""
        if self.measure[0]:
            return f"{word} {self.measure[number > 1]} of {self.one}"
        return f"{word} {self.many if number > 1 else self.bare()}"

    def bare(self) -> str:
        """The English noun without its article."""
        article, _, noun = self.one.partition(" ")
        return noun if article in ("a", "an", "the") else self.one


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Korean = English, and so on."""
    korean_and_english = (pair.split(" = ") for pair in text.split(", "))
    return tuple((korean, english) for korean, english in korean_and_english)


_OTHERS = _pairs(
    "그 = he, 그녀 = she, 민수 = Minsu, 지영 = Jiyeong, 수진 = Sujin, 현우 = Hyeonu, "
    "서연 = Seoyeon, 준호 = Junho, 하늘 = Haneul, 제 누나 = my older sister, "
    "제 남동생 = my little brother, "
    "제 어머니 = my mother, 제 아버지 = my father, 제 친구 = my friend, 선생님 = the teacher, "
    "의사 = the doctor"
)
PEOPLE = (
    Person("저", "I", third=False, be="am"),
    Person("우리", "we", third=False, be="are"),
    *(Person(korean, english) for korean, english in _OTHERS),
    Person("아이들", "the children", third=False, be="are"),
    Person("학생들", "the students", third=False, be="are"),
)
SPEAKERS = PEOPLE[:2]
COMPANIONS = PEOPLE[4:18]  # not the pronouns, whose English form would change after "with"

# What is counted, by its counter: Korean = English / plural.
_COUNTED = {
    "권": "책 = a book / books, 소설 = a novel / novels, 잡지 = a magazine / magazines",
    "부": "신문 = a newspaper / newspapers",
    "통": "편지 = a letter / letters, 이메일 = an email / emails",
    "개": "사과 = an apple / apples, 오렌지 = an orange / oranges, 달걀 = an egg / eggs, "
    "케이크 = a cake / cakes, 샌드위치 = a sandwich / sandwiches, 모자 = a hat / hats, "
    "가방 = a bag / bags, 우산 = an umbrella / umbrellas, 의자 = a chair / chairs, "
    "시계 = a clock / clocks, 열쇠 = a key / keys, 지갑 = a wallet / wallets",
    "송이": "꽃 = a flower / flowers",
    "장": "표 = a ticket / tickets, 그림 = a picture / pictures, 사진 = a photo / photos",
    "대": "자전거 = a bicycle / bicycles, 카메라 = a camera / cameras, "
    "컴퓨터 = a computer / computers, 자동차 = a car / cars",
    "자루": "연필 = a pencil / pencils",
    "마리": "고양이 = a cat / cats, 개 = a dog / dogs, 새 = a bird / birds",
    "그루": "나무 = a tree / trees",
    "편": "영화 = a movie / movies",
}
# What English counts by a measure, by both.
_MEASURED = {
    ("병", "bottle", "bottles"): "물 = water",
    ("잔", "cup", "cups"): "커피 = coffee, 차 = tea",
    ("잔", "glass", "glasses"): "우유 = milk, 주스 = juice",
}
_NOT_COUNTED = _pairs(
    "일기 = a diary, 시 = a poem, 빵 = bread, 김치 = kimchi, 국수 = noodles, 연극 = a play, "
    "텔레비전 = television, 음악 = music, 라디오 = the radio, 노래 = a song, 강의 = a lecture, "
    "한국어 = Korean, 영어 = English, 수학 = math, 피아노 = the piano, 문 = the door, "
    "창문 = the window"
)
_THINGS = {
    thing.bare(): thing
    for thing in (
        *(
            Thing(korean, one, many, counter)
            for counter, text in _COUNTED.items()
            for korean, english in _pairs(text)
            for one, many in [english.split(" / ")]
        ),
        *(
            Thing(korean, english, counter=counter, measure=(one, many))
            for (counter, one, many), text in _MEASURED.items()
            for korean, english in _pairs(text)
        ),
        *(Thing(korean, english) for korean, english in _NOT_COUNTED),
    )
}


def _things(names: str) -> tuple[Thing, ...]:
    """By their English nouns."""
    return tuple(_THINGS[name] for name in names.split(", "))


# What has a price, and what stands about in numbers.
_BOTH = (
    *_things("book, novel, magazine, newspaper, pencil, picture, ticket, flower, hat, bag"),
    *_things("umbrella, clock"),
)
_LARGE = _things("bicycle, camera, computer, car, chair")
GOODS = (
    *_BOTH,
    *_things("water, coffee, tea, milk, juice, apple, orange, egg, cake, sandwich"),
    *_LARGE,
)
OBJECTS = (
    *_BOTH,
    *_things("letter, photo, key, wallet, apple, orange, egg, cake, sandwich"),
    *_things("cat, dog, bird, tree"),
    *_LARGE,
)

# Each verb, and below it the things that it takes as an object.
_ACTIONS = """\
읽, 읽어 = read, reads, read, reading
book, novel, magazine, newspaper, letter, email, poem
쓰, 써 = write, writes, wrote, writing
letter, email, diary, poem, novel
마시, 마셔 = drink, drinks, drank, drinking
water, coffee, tea, milk, juice
먹, 먹어 = eat, eats, ate, eating
apple, orange, egg, bread, kimchi, noodles, cake, sandwich
사, 사 = buy, buys, bought, buying
hat, bag, umbrella, flower, ticket, bicycle, camera, computer, apple, bread, pencil
팔, 팔아 = sell, sells, sold, selling
hat, bag, umbrella, flower, ticket, bicycle, car, cake, orange, juice, picture
보, 봐 = watch, watches, watched, watching
movie, play, television, bird
듣, 들어, 들을 = listen to, listens to, listened to, listening to
music, radio, song, lecture
만들, 만들어 = make, makes, made, making
cake, sandwich, chair, kimchi, bread, hat, bag, juice, movie
배우, 배워 = learn, learns, learned, learning
Korean, English, math, piano
가르치, 가르쳐 = teach, teaches, taught, teaching
Korean, English, math, piano
찾, 찾아 = look for, looks for, looked for, looking for
key, wallet, cat, dog, bag, ticket, photo, umbrella
그리, 그려 = draw, draws, drew, drawing
picture, flower, tree, cat, dog, bird, car
찍, 찍어 = take, takes, took, taking
photo
빌리, 빌려 = borrow, borrows, borrowed, borrowing
book, umbrella, bicycle, camera, pencil, car, computer
고치, 고쳐 = fix, fixes, fixed, fixing
computer, bicycle, clock, chair, car, camera
열, 열어 = open, opens, opened, opening
door, window, bag, email
닫, 닫아 = close, closes, closed, closing
door, window, bag
좋아하, 좋아해 = like, likes, liked, liking
music, coffee, tea, math, kimchi, noodles, bread, juice, milk
"""


def _verb(text: str) -> Verb:
    korean, english = (side.split(", ") for side in text.split(" = "))
    base, third, past, ing = english
    stem, joined, irregular = (*korean, "")[:3]
    return Verb(stem, joined, (base, third, past, ing), irregular, stative=base == "like")


_lines = iter(_ACTIONS.splitlines())
ACTIONS = tuple((_verb(verb), _things(next(_lines))) for verb in _lines)
GO = _verb("가, 가 = go, goes, went, going")
COME = _verb("오, 와 = come, comes, came, coming")

# Korean, English and its preposition for being there.
PLACES = (
    *(("도서관", "the library", "at"), ("학교", "school", "at"), ("공원", "the park", "in")),
    *(("카페", "the cafe", "at"), ("회사", "the office", "at"), ("시장", "the market", "at")),
    *(("식당", "the restaurant", "at"), ("부엌", "the kitchen", "in")),
    *(("교실", "the classroom", "in"), ("거실", "the living room", "in")),
    *(("백화점", "the department store", "at"), ("공항", "the airport", "at")),
    *(("서점", "the bookstore", "at"), ("서울", "Seoul", "in"), ("부산", "Busan", "in")),
)
VEHICLES = _pairs(
    "버스 = bus, 지하철 = subway, 기차 = train, 자전거 = bicycle, 택시 = taxi, 트럭 = truck"
)
SCHEDULED = (("기차", "train"), ("버스", "bus"), ("비행기", "plane"))
EVENTS = (("영화", "movie"), ("수업", "class"), ("회의", "meeting"), ("연극", "play"))
# An adjective goes before any thing that has a plural.
ADJECTIVES = _pairs(
    "새 = new, 큰 = big, 작은 = small, 비싼 = expensive, 예쁜 = pretty, 오래된 = old, 빨간 = red, "
    "파란 = blue"
)
WHEN = {
    "past": _pairs(
        "어제 = yesterday, 지난주에 = last week, 작년에 = last year, 오늘 아침에 = this morning"
    ),
    "present": _pairs(
        "매일 = every day, 아침마다 = every morning, 주말마다 = every weekend, 가끔 = sometimes"
    ),
    "future": _pairs(
        "내일 = tomorrow, 다음 주에 = next week, 내년에 = next year, 오늘 밤에 = tonight"
    ),
    "now": _pairs("지금 = now"),
}
WEEKDAYS = _pairs(
    "월요일 = Monday, 화요일 = Tuesday, 수요일 = Wednesday, 목요일 = Thursday, 금요일 = Friday, "
    "토요일 = Saturday, 일요일 = Sunday"
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
