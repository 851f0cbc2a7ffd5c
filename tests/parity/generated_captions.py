"""Captions as no one writes them: many scripts, signs, numbers, addresses, nothing; the same everywhere.

Only `random()` is drawn, whose numbers are the same in every version of Python, so that stored values hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def words(text: str) -> list[str]:
    """What stands between blanks."""
    return text.split()


PLAIN = words(
    "a man woman dog cat riding on the street red bus with umbrella two people standing near table "
    "pizza white plate train tracks next to in of and sitting bench field"
)
WORDS = [
    *PLAIN,
    *words(
        "man's isn't don't it's couple's TV's can't won't I'm they'll we've ma'am o'clock rock'n'roll "
        "'90s cannot gonna 2 10 20th 5:30 p.m. a.m. U.S. U.K. St. Mr. Dr. No. vs. e.g. etc. Ph.D. Jan. "
        "Inc. half-eaten t-shirt black-and-white 12-year-old X-ray O'Brien AT&T R&B and/or w/ A+ C++ "
        "3.5 .5 1,000 1/2 $5 50% #1 @home 5'10\" 6x4 555-1234 caf\xe9 na\xefve \u65e5\u672c\u8a9e "
        "\ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
        "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 "
        "\u0e44\u0e17\u0e22 \xbd \xb2 \U0001f600 \u2122 \xb0 \u2026 \u201ccurly\u201d \u2018so\u2019 "
        'it\u2019s \u2013 \u2014 -- ... ! ?! , ; : ( ) [x] {y} "stop" < > <b> </b> &amp; '
        "http://a.com/b?c=d www.foo.org foo.com a@b.com :) ;-) ^_^ * ** _ / \\ | ~ = + $ \u20ac \xa3"
    ),
]
BLANKS = [" "] * 14 + [
    "",
    "  ",
    "   ",
    "\t",
    "\xa0",
    "\u3000",
    "\u2009",
    "\n",
    ", ",
    ". ",
    " - ",
    "-",
    ".",
    "'",
]
NUMBERS = words("0 1 2 5 10 19 55 90 99 212 555 1990 5555 1,000 .5 1.5 \xbd \xb9 \u2083 \u0663")
BETWEEN = [" "] * 6 + [
    "-",
    "-",
    "/",
    "/",
    *words(". , : ( ) + - $ % x th 's ' \" = * # \xa3 \u20ac & \u2013 \u2044 \xad"),
]
WEB = words(
    "http:// https:// ftp:// www. Www. foo bar a Foo 23 .com .org .COM .uk .html .jpg .tar.gz / ? = "
    "& # @ @ - . : ( ) < > \" ' , ! \xe9 \u65e5 [ ] { } &amp; &lt; &quot; &eacute; &#39; <br/> <!-- "
    "--> <a href='x'> #tag @user"
)
SHORT = words(
    "Mr Mrs Ms Dr St Jr No no fig figs p pp art Inc Ltd Co Ph.D U.S U.S.A a.m p.m A B J T I a t e.g "
    "i.e etc vs Calif Mass Ill Jan Sept Mon Lt Col Gen Gov Prof Ave Blvd vol Mt ft lb oz in dept"
)
BEHIND = [
    ". ",
    ". ",
    ".",
    ".,",
    ".;",
    ".!",
    "...",
    ". . .",
    ".-",
    "'s",
    ".'s",
    ".)",
    '"',
    " ",
    "/",
    "&",
    ".\u3000",
]
STARTS = words("The A An In It He But So One Mr. the THE in 5 10 dog I")
APOSTROPHES = words(
    "' ' \u2019 \u2018 ` n't n\u2019t 's 'S 'm 'd 're 've 'll N'T d o l O y j ol cap'n 'n' 'em 'til "
    "'tis 'twas a dog cannot gonna gotta wanna lemme gimme not is don could - . , \xe9 90s 1 O'Neil "
    "D'Angelo l'eau s'mores c'mon"
)
FACES = words(
    ": ; = ) ( D P p @ \\ [ ] { } | - o * ' < > :) ;-) :3 ^_^ -_- (^_^) >_< ~ _ . a 1 , ! ? *** ## "
    "US$ $ C++ + -- --- ..... ...... !! << >> & && AT&T A&amp;B"
)
PLANES = (
    [(0x20, 0x7E)] * 3
    + [
        (0x00, 0x1F),
        (0x80, 0xFF),
        (0x100, 0x24F),
        (0x300, 0x36F),
        (0x370, 0x3FF),
        (0x400, 0x4FF),
        (0x530, 0x6FF),
    ]
    + [(0x900, 0xDFF), (0xE00, 0xEFF), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x20CF), (0x2100, 0x2BFF)]
    + [
        (0x3000, 0x33FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xE000, 0xF8FF),
        (0xFB00, 0xFFFD),
        (0x1F300, 0x1FAFF),
    ]
)


class Source:
    """Draws captions.

    Args:
        seed: of all that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def text(self) -> str:
        """A caption, of any kind."""
        kinds: list[Callable[[], str]] = [
            *[self.sentence] * 6,
            *[lambda: self.some(WORDS, BLANKS, 12)] * 6,
            lambda: self.some(NUMBERS, BETWEEN, 6),
            lambda: self.some(WEB, ["", "", "", " "], 8),
            lambda: self.some(SHORT, BEHIND, 3) + self.pick(STARTS),
            lambda: self.some(APOSTROPHES, ["", "", " "], 8),
            lambda: self.some(FACES, ["", "", " "], 8),
            self.letters,
            lambda: self.pick(
                ["", " ", ".", "...", "?!", "-", '"', "  ", "\n", "'s", "(", "\u3000", "#", "|||"]
            ),
        ]
        return self.pick(kinds)()

    def sentence(self) -> str:
        """What a captioner may write."""
        found = self.some(PLAIN, [" "], 12).strip()
        return found[:1].upper() + found[1:] + self.pick([".", ".", "", " .", "!"])

    def long(self) -> str:
        """Several hundred words."""
        return self.some(WORDS, [" "], 600)

    def some(self, words: Sequence[str], blanks: Sequence[str], most: int) -> str:
        """Words and what is between them."""
        return "".join(self.pick(words) + self.pick(blanks) for _ in range(self.below(most) + 1))

    def letters(self) -> str:
        """Characters of one or two scripts."""
        planes = [self.pick(PLANES), self.pick(PLANES), (0x20, 0x20)]
        drawn = (self.pick(planes) for _ in range(self.below(15)))
        return "".join(chr(low + self.below(high - low + 1)) for low, high in drawn)

    def pick(self, several: Sequence[T]) -> T:
        """One of several."""
        return several[self.below(len(several))]

    def below(self, end: int) -> int:
        """A number from 0 to `end` - 1."""
        return int(self._random() * end)


def generated(seed: int, images: int, references: int = 5) -> tuple[list[str], list[list[str]]]:
    """Captions and references that say some of the same, every hundredth one very long."""
    source = Source(seed)
    captions, groups = [], []
    for number in range(images):
        text = source.long() if number % 100 == 0 else source.text()
        group = [source.text() for _ in range(references)]
        # Some of the caption's own words, or scores would all be near 0.
        group = [other + " " + text if source.below(3) == 0 else other for other in group]
        captions.append(text)
        groups.append(group)
    return captions, groups
