"""Captions of scenes: writing them, reading them back, and judging them.

A caption names every thing of its scene with color and shape, says "small" and the texture where they are
not the default (large, plain), and places things on the grid or relates them. `parse` reads such English (also
after LAVIS's clean-up, also a model's) into `Claims`; `matches` says whether they are true of a scene.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from blip import keyed
from blip.data.scenes_world import (
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    Scene,
    Thing,
    contents,
    pick,
    pick_weighted,
    related,
    shuffled,
)

MAX_WORDS = 20

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
TEXTURE_WORDS = {"plain": ("plain",), "striped": ("striped",), "dotted": ("dotted", "spotted")}
TEXTURE_TAILS = {"striped": ("with stripes",), "dotted": ("with dots", "with spots")}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_ROW_WORDS = (("top", "upper"), ("middle",), ("bottom", "lower"))
_EDGES = {
    (0, 1): ("at the top", "near the top", "at the top center"),
    (2, 1): ("at the bottom", "near the bottom", "at the bottom center"),
    (1, 0): ("on the left", "on the left side", "at the left edge"),
    (1, 2): ("on the right", "on the right side", "at the right edge"),
    (1, 1): ("in the center", "in the middle"),
}


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
        return [
            name for name in ("shape", "color", "size", "texture", "place") if getattr(self, name) is not None
        ]

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


# -- writing -------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true description of `scene`, rarely more than `MAX_WORDS` words; wording drawn from `rng`."""
    best = ""
    for _ in range(12):
        text = _draft(scene, rng)
        if not best or len(text.split()) < len(best.split()):
            best = text
        if len(best.split()) <= MAX_WORDS:
            break
    return best


def captions(scenes: list[Scene], seed: int = 0) -> list[str]:
    """One caption per scene, each true of its own scene and, where wording allows, of no other in the list.

    No two are equal, also after clean-up (lower case, punctuation to spaces).
    """
    alike: dict[object, list[Scene]] = {}
    for one in scenes:
        alike.setdefault(contents(one), []).append(one)
    texts, used = [], set()
    for one in scenes:
        rng = keyed.generator(seed, "caption", one.split, one.index)
        best, cost = "", 10**9
        for _ in range(40):
            text = caption(one, rng)
            claims = parse(text)
            others = sum(matches(claims, other) for other in alike[contents(one)]) - 1
            others += 1000 * (normal(text) in used)
            if others < cost:
                best, cost = text, others
            if not cost:
                break
        used.add(normal(best))
        texts.append(best)
    return texts


def noun_phrase(thing: Thing, rng: np.random.Generator, size: float = 1.0, plain: float = 0.1) -> str:
    """A thing in words, without article: "small red star with dots".

    Args:
        size: how often "large" is said, too ("small" always is).
        plain: how often "plain" is said, too (other textures always are).
    """
    words, tail = [], []
    if thing.size == "small" or rng.random() < size:
        words.append(pick_weighted(rng, SIZE_WORDS[thing.size], (0.6, 0.25, 0.15)))
    if thing.texture != "plain":
        if rng.random() < 0.25:
            tail.append(pick(rng, TEXTURE_TAILS[thing.texture]))
        else:
            words.append(pick(rng, TEXTURE_WORDS[thing.texture]))
    elif rng.random() < plain:
        words.append("plain")
    return " ".join([*words, thing.color, thing.shape, *tail])


def article(noun: str) -> str:
    """ "a star", "an orange star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def place_phrase(place: tuple[int, int], rng: np.random.Generator) -> str:
    """Where on the grid: "in the upper left corner"."""
    if place in _EDGES:
        return pick(rng, _EDGES[place])
    spot = f"{pick(rng, _ROW_WORDS[place[0]])} {COLUMNS[place[1]]}"
    return pick(rng, (f"at the {spot}", f"in the {spot}", f"in the {spot} corner"))


def place_name(place: tuple[int, int]) -> str:
    """The one short name of a place, used in answers: "top left", "center", "left"."""
    row, column = ROWS[place[0]], COLUMNS[place[1]]
    return {(1, 1): "center", (1, 0): "left", (1, 2): "right"}.get(
        place, row if place[1] == 1 else f"{row} {column}"
    )


def relation_phrase(a: Thing, b: Thing, rng: np.random.Generator) -> str:
    """A true relation of `a` to `b` in words."""
    true = [name for name in RELATION_WORDS if related(a, name, b)]
    return pick(rng, RELATION_WORDS[pick(rng, true)])


def _draft(scene: Scene, rng: np.random.Generator) -> str:
    things = shuffled(rng, scene.things)
    size, plain = ((0.7, 0.15), (0.5, 0.1), (0.25, 0.05), (0.0, 0.0))[len(things) - 1]
    names = [noun_phrase(thing, rng, size, plain) for thing in things]
    if len(things) < 4:
        names = [article(name) for name in names]
    return (_one, _two, _three, _four)[len(things) - 1](things, names, rng)


def _one(things: list[Thing], names: list[str], rng: np.random.Generator) -> str:
    name, where = names[0], place_phrase(things[0].place, rng)
    bare = name.split(" ", 1)[1]
    whole = "" if where.endswith(("edge", "corner")) else " of the picture"
    return pick(
        rng,
        (
            f"{name} {where}",
            f"there is {name} {where}",
            f"there is only {name} {where}",
            f"{where} there is {name}",
            f"{where} we see {name}",
            f"a picture of {name} {where}",
            f"this picture shows {name} {where}",
            f"an image of one {bare} {where}",
            f"one {bare} {where}",
            f"{name} is {where}{whole}",
        ),
    )


def _two(things: list[Thing], names: list[str], rng: np.random.Generator) -> str:
    a, b = names
    at_a, at_b = (place_phrase(thing.place, rng) for thing in things)
    link = relation_phrase(things[0], things[1], rng)
    back = relation_phrase(things[1], things[0], rng)
    return pick(
        rng,
        (
            f"{a} {at_a} and {b} {at_b}",
            f"{a} {at_a}, {b} {at_b}",
            f"{a} {link} {b}",
            f"{a} is {link} {b}",
            f"there is {a} {link} {b}",
            f"{a} {at_a} is {link} {b}",
            f"{a} is {at_a} and {link} {b}",
            f"{at_a} there is {a} {link} {b}",
            f"{a} {at_a} with {b} {back} it",
            f"a picture of {a} {link} {b}",
        ),
    )


def _three(things: list[Thing], names: list[str], rng: np.random.Generator) -> str:
    a, b, c = names
    at_a, at_c = place_phrase(things[0].place, rng), place_phrase(things[2].place, rng)
    ab, bc = relation_phrase(things[0], things[1], rng), relation_phrase(things[1], things[2], rng)
    ac, ba = relation_phrase(things[0], things[2], rng), relation_phrase(things[1], things[0], rng)
    return pick(
        rng,
        (
            f"{a} {ab} {b} and {c} {at_c}",
            f"{a} {ab} {b}, {c} {at_c}",
            f"{a} is {ab} {b} and {ac} {c}",
            f"{a} {at_a}, {b} {bc} {c}",
            f"{a} {at_a} and {b} {bc} {c}",
            f"{a} with {b} {ba} it and {c} {at_c}",
            f"there is {a} {ab} {b} and {c} {at_c}",
        ),
    )


def _four(things: list[Thing], names: list[str], rng: np.random.Generator) -> str:
    a, b, c, d = names
    ab, cd = relation_phrase(things[0], things[1], rng), relation_phrase(things[2], things[3], rng)
    at_d = place_phrase(things[3].place, rng)
    ac = relation_phrase(things[0], things[2], rng)
    return pick(
        rng,
        (
            f"{a} {ab} {b}, {c} {cd} {d}",
            f"{a} {ab} {b} and {c} {cd} {d}",
            f"{a} {ab} {b} and {ac} {c}, {d} {at_d}",
        ),
    )


# -- reading -------------------------------------------------------------------------------------------

_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_TEXTURES = {word: texture for texture, words in TEXTURE_WORDS.items() for word in words}
_TAILS = {words: texture for texture, tails in TEXTURE_TAILS.items() for words in tails}
_RELATION_PATTERN = r"(?:(?:to|on) the )?(?P<side>left|right) of(?! the (?:picture|image))|(?P<vertical>above|over|below|under|beneath)"
_PLACE_PATTERN = (
    r"(?:at|in|near|on) the (?:"
    r"(?P<row>top|upper|bottom|lower)(?: (?P<column>left|right|center)(?: corner)?)?"
    r"|(?P<edge>left|right)(?: (?:side|edge))?|(?P<middle>center|middle))"
)
_LEXER = re.compile(
    rf"\b(?:{_RELATION_PATTERN}|{_PLACE_PATTERN}|(?P<tail>{'|'.join(_TAILS)})|(?P<word>[a-z]+))\b"
)
_VERTICAL = {word: name for name in ("above", "below") for word in RELATION_WORDS[name]}


def normal(text: str) -> str:
    """`text` in lower case, punctuation as spaces, single spaces: LAVIS's caption clean-up, and a little more."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def parse(text: str) -> Claims:
    """The claims of a caption; words that claim nothing are skipped, so any text has a (perhaps empty) reading."""
    claims = Claims()
    pending: dict[str, str] = {}
    front: tuple[int, int] | None = None  # a place before the first thing belongs to it
    open_relation: tuple[int, str] | None = None
    previous, subject, last = "", 0, -1
    for token in _LEXER.finditer(normal(text)):
        kind, value = _classify(token)
        if kind == "shape":
            mention = Mention(value, pending.get("color"), pending.get("size"), pending.get("texture"), front)
            claims.things.append(mention)
            last, pending, front = len(claims.things) - 1, {}, None
            if open_relation is not None:
                claims.relations.append((*open_relation, last))
                open_relation = None
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
            open_relation = (subject, value)
        elif kind == "it" and open_relation is not None and last > 0:
            claims.relations.append((*open_relation, last - 1))
            open_relation = None
        previous = token.group()
    return claims


def _classify(token: re.Match[str]) -> tuple[str, str]:
    word = token["word"]
    if word is None:
        if token["side"]:
            return "relation", token["side"]
        if token["vertical"]:
            return "relation", _VERTICAL[token["vertical"]]
        return ("tail", _TAILS[token["tail"]]) if token["tail"] else ("place", "")
    for kind, table in (("size", _SIZES), ("texture", _TEXTURES)):
        if word in table:
            return kind, table[word]
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


# -- judging -------------------------------------------------------------------------------------------


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

    Attributes of mentions beyond the number of things count as wrong; so does a text that mentions nothing.
    """
    claims = parse(text)
    mentions = claims.things
    stated = sum(len(mention.stated()) for mention in mentions) + len(claims.relations)
    things: list[Thing | None] = [*scene.things, *[None] * max(0, len(mentions) - len(scene.things))]
    right = max(_right(claims, chosen) for chosen in permutations(things[:7], min(len(mentions), 7)))
    return CaptionScore(right, max(stated, 1), right == stated > 0 and len(mentions) == len(scene.things))


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
