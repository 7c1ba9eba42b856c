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


PEOPLE = (
    Person("저", "I", third=False, be="am"),
    Person("우리", "we", third=False, be="are"),
    Person("그", "he"),
    Person("그녀", "she"),
    Person("민수", "Minsu"),
    Person("지영", "Jiyeong"),
    Person("수진", "Sujin"),
    Person("현우", "Hyeonu"),
    Person("서연", "Seoyeon"),
    Person("준호", "Junho"),
    Person("하늘", "Haneul"),
    Person("제 누나", "my older sister"),
    Person("제 남동생", "my little brother"),
    Person("제 어머니", "my mother"),
    Person("제 아버지", "my father"),
    Person("제 친구", "my friend"),
    Person("선생님", "the teacher"),
    Person("의사", "the doctor"),
    Person("아이들", "the children", third=False, be="are"),
    Person("학생들", "the students", third=False, be="are"),
)
SPEAKERS = PEOPLE[:2]
COMPANIONS = PEOPLE[4:18]  # not the pronouns, whose English form would change after "with"

_CUP, _BOTTLE, _GLASS = ("cup", "cups"), ("bottle", "bottles"), ("glass", "glasses")

BOOK = Thing("책", "a book", "books", "권")
NOVEL = Thing("소설", "a novel", "novels", "권")
MAGAZINE = Thing("잡지", "a magazine", "magazines", "권")
NEWSPAPER = Thing("신문", "a newspaper", "newspapers", "부")
LETTER = Thing("편지", "a letter", "letters", "통")
EMAIL = Thing("이메일", "an email", "emails", "통")
DIARY = Thing("일기", "a diary")
POEM = Thing("시", "a poem")
WATER = Thing("물", "water", counter="병", measure=_BOTTLE)
COFFEE = Thing("커피", "coffee", counter="잔", measure=_CUP)
TEA = Thing("차", "tea", counter="잔", measure=_CUP)
MILK = Thing("우유", "milk", counter="잔", measure=_GLASS)
JUICE = Thing("주스", "juice", counter="잔", measure=_GLASS)
APPLE = Thing("사과", "an apple", "apples", "개")
ORANGE = Thing("오렌지", "an orange", "oranges", "개")
EGG = Thing("달걀", "an egg", "eggs", "개")
BREAD = Thing("빵", "bread")
KIMCHI = Thing("김치", "kimchi")
NOODLES = Thing("국수", "noodles")
CAKE = Thing("케이크", "a cake", "cakes", "개")
SANDWICH = Thing("샌드위치", "a sandwich", "sandwiches", "개")
HAT = Thing("모자", "a hat", "hats", "개")
BAG = Thing("가방", "a bag", "bags", "개")
UMBRELLA = Thing("우산", "an umbrella", "umbrellas", "개")
FLOWER = Thing("꽃", "a flower", "flowers", "송이")
TICKET = Thing("표", "a ticket", "tickets", "장")
BICYCLE = Thing("자전거", "a bicycle", "bicycles", "대")
CAMERA = Thing("카메라", "a camera", "cameras", "대")
COMPUTER = Thing("컴퓨터", "a computer", "computers", "대")
CAR = Thing("자동차", "a car", "cars", "대")
CHAIR = Thing("의자", "a chair", "chairs", "개")
CLOCK = Thing("시계", "a clock", "clocks", "개")
PENCIL = Thing("연필", "a pencil", "pencils", "자루")
CAT = Thing("고양이", "a cat", "cats", "마리")
DOG = Thing("개", "a dog", "dogs", "마리")
BIRD = Thing("새", "a bird", "birds", "마리")
TREE = Thing("나무", "a tree", "trees", "그루")
PICTURE = Thing("그림", "a picture", "pictures", "장")
PHOTO = Thing("사진", "a photo", "photos", "장")
MOVIE = Thing("영화", "a movie", "movies", "편")
KEY = Thing("열쇠", "a key", "keys", "개")
WALLET = Thing("지갑", "a wallet", "wallets", "개")
PLAY = Thing("연극", "a play")
TELEVISION = Thing("텔레비전", "television")
MUSIC = Thing("음악", "music")
RADIO = Thing("라디오", "the radio")
SONG = Thing("노래", "a song")
LECTURE = Thing("강의", "a lecture")
KOREAN = Thing("한국어", "Korean")
ENGLISH = Thing("영어", "English")
MATH = Thing("수학", "math")
PIANO = Thing("피아노", "the piano")
DOOR = Thing("문", "the door")
WINDOW = Thing("창문", "the window")

# What has a price, and what stands about in numbers.
GOODS = (
    *(BOOK, NOVEL, MAGAZINE, NEWSPAPER, PENCIL, PICTURE, TICKET, FLOWER, HAT, BAG, UMBRELLA, CLOCK),
    *(WATER, COFFEE, TEA, MILK, JUICE, APPLE, ORANGE, EGG, CAKE, SANDWICH),
    *(BICYCLE, CAMERA, COMPUTER, CAR, CHAIR),
)
OBJECTS = (
    *(BOOK, NOVEL, MAGAZINE, NEWSPAPER, PENCIL, PICTURE, TICKET, FLOWER, HAT, BAG, UMBRELLA, CLOCK),
    *(LETTER, PHOTO, KEY, WALLET, APPLE, ORANGE, EGG, CAKE, SANDWICH, CAT, DOG, BIRD, TREE),
    *(BICYCLE, CAMERA, COMPUTER, CAR, CHAIR),
)

# Each verb with the things that it takes as an object.
ACTIONS: tuple[tuple[Verb, tuple[Thing, ...]], ...] = (
    (
        Verb("읽", "읽어", ("read", "reads", "read", "reading")),
        (BOOK, NOVEL, MAGAZINE, NEWSPAPER, LETTER, EMAIL, POEM),
    ),
    (
        Verb("쓰", "써", ("write", "writes", "wrote", "writing")),
        (LETTER, EMAIL, DIARY, POEM, NOVEL),
    ),
    (
        Verb("마시", "마셔", ("drink", "drinks", "drank", "drinking")),
        (WATER, COFFEE, TEA, MILK, JUICE),
    ),
    (
        Verb("먹", "먹어", ("eat", "eats", "ate", "eating")),
        (APPLE, ORANGE, EGG, BREAD, KIMCHI, NOODLES, CAKE, SANDWICH),
    ),
    (
        Verb("사", "사", ("buy", "buys", "bought", "buying")),
        (HAT, BAG, UMBRELLA, FLOWER, TICKET, BICYCLE, CAMERA, COMPUTER, APPLE, BREAD, PENCIL),
    ),
    (
        Verb("팔", "팔아", ("sell", "sells", "sold", "selling")),
        (HAT, BAG, UMBRELLA, FLOWER, TICKET, BICYCLE, CAR, CAKE, ORANGE, JUICE, PICTURE),
    ),
    (
        Verb("보", "봐", ("watch", "watches", "watched", "watching")),
        (MOVIE, PLAY, TELEVISION, BIRD),
    ),
    (
        Verb(
            "듣",
            "들어",
            ("listen to", "listens to", "listened to", "listening to"),
            irregular="들을",
        ),
        (MUSIC, RADIO, SONG, LECTURE),
    ),
    (
        Verb("만들", "만들어", ("make", "makes", "made", "making")),
        (CAKE, SANDWICH, CHAIR, KIMCHI, BREAD, HAT, BAG, JUICE, MOVIE),
    ),
    (
        Verb("배우", "배워", ("learn", "learns", "learned", "learning")),
        (KOREAN, ENGLISH, MATH, PIANO),
    ),
    (
        Verb("가르치", "가르쳐", ("teach", "teaches", "taught", "teaching")),
        (KOREAN, ENGLISH, MATH, PIANO),
    ),
    (
        Verb("찾", "찾아", ("look for", "looks for", "looked for", "looking for")),
        (KEY, WALLET, CAT, DOG, BAG, TICKET, PHOTO, UMBRELLA),
    ),
    (
        Verb("그리", "그려", ("draw", "draws", "drew", "drawing")),
        (PICTURE, FLOWER, TREE, CAT, DOG, BIRD, CAR),
    ),
    (Verb("찍", "찍어", ("take", "takes", "took", "taking")), (PHOTO,)),
    (
        Verb("빌리", "빌려", ("borrow", "borrows", "borrowed", "borrowing")),
        (BOOK, UMBRELLA, BICYCLE, CAMERA, PENCIL, CAR, COMPUTER),
    ),
    (
        Verb("고치", "고쳐", ("fix", "fixes", "fixed", "fixing")),
        (COMPUTER, BICYCLE, CLOCK, CHAIR, CAR, CAMERA),
    ),
    (Verb("열", "열어", ("open", "opens", "opened", "opening")), (DOOR, WINDOW, BAG, EMAIL)),
    (Verb("닫", "닫아", ("close", "closes", "closed", "closing")), (DOOR, WINDOW, BAG)),
    (
        Verb("좋아하", "좋아해", ("like", "likes", "liked", "liking"), stative=True),
        (MUSIC, COFFEE, TEA, MATH, KIMCHI, NOODLES, BREAD, JUICE, MILK),
    ),
)
GO = Verb("가", "가", ("go", "goes", "went", "going"))
COME = Verb("오", "와", ("come", "comes", "came", "coming"))

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
