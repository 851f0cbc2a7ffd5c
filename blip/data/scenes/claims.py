"""What a text claims about a scene: reading captions, and judging them.

`parse` reads a caption (also after LAVIS's clean-up, also one a model wrote) into `Claims`; `matches` says
whether they are true of a scene, `score_caption` how many are. None knows the templates of captions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from blip.data.scenes.world import COLORS, COLUMNS, SHAPES, Scene, Thing, related

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
TEXTURE_WORDS = {"plain": ("plain",), "striped": ("striped",), "dotted": ("dotted", "spotted")}
TEXTURE_TAILS = {"striped": ("with stripes",), "dotted": ("with dots", "with spots")}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}

_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_TEXTURES = {word: texture for texture, words in TEXTURE_WORDS.items() for word in words}
_TAILS = {words: texture for texture, tails in TEXTURE_TAILS.items() for words in tails}
_VERTICAL = {word: name for name in ("above", "below") for word in RELATION_WORDS[name]}
_RELATION = (
    r"(?:(?:to|on) the )?(?P<side>left|right) of(?! the (?:picture|image))"
    r"|(?P<vertical>above|over|below|under|beneath)"
)
_PLACE = (
    r"(?:at|in|near|on) the (?:"
    r"(?P<row>top|upper|bottom|lower)(?: (?P<column>left|right|center)(?: corner)?)?"
    r"|(?P<edge>left|right)(?: (?:side|edge))?|(?P<middle>center|middle))"
)
_LEXER = re.compile(rf"\b(?:{_RELATION}|{_PLACE}|(?P<tail>{'|'.join(_TAILS)})|(?P<word>[a-z]+))\b")
_ATTRIBUTES = ("shape", "color", "size", "texture", "place")


@dataclass
class Mention:
    """What a text says about one thing; None where it says nothing."""

    shape: str
    color: str | None = None
    size: str | None = None
    texture: str | None = None
    place: tuple[int, int] | None = None

    def stated(self) -> list[str]:
        """Names of the attributes the text gives."""
        return [name for name in _ATTRIBUTES if getattr(self, name) is not None]

    def agrees(self, thing: Thing) -> bool:
        """Whether all that is said is true of `thing`."""
        return all(getattr(self, name) == getattr(thing, name) for name in self.stated())


@dataclass
class Claims:
    """The structure of a caption: things and relations between them."""

    things: list[Mention] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    """(i, relation, j): things[i] is left of (right of, above, below) things[j]."""


@dataclass(frozen=True)
class CaptionScore:
    """How much of a caption is true of a scene."""

    right: int
    stated: int
    whole: bool
    """Everything stated is right and every thing of the scene is mentioned."""


def normal(text: str) -> str:
    """`text` in lower case, punctuation as spaces, single spaces; at least LAVIS's caption clean-up."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def parse(text: str) -> Claims:
    """The claims of a caption; words that claim nothing are skipped, so any text can be read."""
    claims = Claims()
    pending: dict[str, str] = {}
    front: tuple[int, int] | None = None  # a place before the first thing belongs to it
    link: tuple[int, str] | None = None  # a relation still without its second thing
    previous, subject, last = "", 0, -1
    for token in _LEXER.finditer(normal(text)):
        kind, value = _classify(token)
        if kind == "shape":
            claims.things.append(
                Mention(value, pending.get("color"), pending.get("size"), pending.get("texture"), front)
            )
            last, pending, front = len(claims.things) - 1, {}, None
            if link is not None:
                claims.relations.append((*link, last))
                link = None
        elif kind in ("color", "size", "texture"):
            pending[kind] = value
        elif kind == "tail" and last >= 0:
            claims.things[last].texture = value
        elif kind == "place":
            if last < 0:
                front = _place(token)
            else:
                claims.things[last].place = _place(token)
        elif kind == "relation" and last >= 0:
            # "a above b and left of c": the second relation is a's again.
            subject = subject if previous == "and" and claims.relations else last
            link = (subject, value)
        elif kind == "it" and link is not None and last > 0:
            claims.relations.append((*link, last - 1))
            link = None
        previous = token.group()
    return claims


def matches(claims: Claims, scene: Scene, whole: bool = True) -> bool:
    """Whether the claims are true of the scene; what is not said is not judged.

    Args:
        whole: also ask that every thing of the scene is mentioned, as in the dataset's captions.
    """
    count = len(claims.things)
    if count > len(scene.things) or not count or (whole and count < len(scene.things)):
        return False
    for chosen in permutations(scene.things, count):
        if all(mention.agrees(thing) for mention, thing in zip(claims.things, chosen, strict=True)) and all(
            related(chosen[i], relation, chosen[j]) for i, relation, j in claims.relations
        ):
            return True
    return False


def score_caption(text: str, scene: Scene) -> CaptionScore:
    """How many of the attributes and relations that `text` states are right, under the best assignment.

    Attributes of mentions beyond the number of things are wrong; a text that states nothing scores 0 of 1.
    """
    claims = parse(text)
    stated = sum(len(mention.stated()) for mention in claims.things) + len(claims.relations)
    slots = min(len(claims.things), 6)  # a babbling model may mention dozens; none but the first can be right
    things = [*scene.things, *[None] * max(0, slots - len(scene.things))]
    right = max(_right(claims, chosen) for chosen in permutations(things, slots))
    return CaptionScore(right, max(stated, 1), right == stated > 0 and slots == len(scene.things))


def expected_r1(keys: Sequence[Hashable]) -> float:
    """Expected R@1 in percent, the same both ways, of a model that sees of each scene its `keys` entry only.

    It finds the images (texts) whose key equals the query's and guesses among them.
    """
    share = Counter(keys)
    return 100 * sum(1 / share[key] for key in keys) / max(len(keys), 1)


def _classify(token: re.Match[str]) -> tuple[str, str]:
    """Kind and value of a token; the kind is empty where it claims nothing."""
    word = token["word"]
    if word is None:
        if token["side"]:
            return "relation", token["side"]
        if token["vertical"]:
            return "relation", _VERTICAL[token["vertical"]]
        return ("tail", _TAILS[token["tail"]]) if token["tail"] else ("place", "")
    if word in _SIZES:
        return "size", _SIZES[word]
    if word in _TEXTURES:
        return "texture", _TEXTURES[word]
    if word in COLORS:
        return "color", word
    if word in SHAPES:
        return "shape", word
    return ("it", word) if word == "it" else ("", word)


def _place(token: re.Match[str]) -> tuple[int, int]:
    if token["middle"]:
        return 1, 1
    if token["edge"]:
        return 1, COLUMNS.index(token["edge"])
    row = 0 if token["row"] in ("top", "upper") else 2
    return row, COLUMNS.index(token["column"] or "center")


def _right(claims: Claims, chosen: tuple[Thing | None, ...]) -> int:
    right = 0
    for mention, thing in zip(claims.things, chosen, strict=False):
        if thing is not None:
            right += sum(getattr(mention, name) == getattr(thing, name) for name in mention.stated())
    for i, relation, j in claims.relations:
        if i < len(chosen) and j < len(chosen):
            a, b = chosen[i], chosen[j]
            right += a is not None and b is not None and related(a, relation, b)
    return right
