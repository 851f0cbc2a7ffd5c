"""Words for scenes: noun phrases, places, relations, and captions.

A caption names every thing of its scene with color and shape, says "small" and the texture where they are
not the default (large, plain), and places things on the grid or relates them. All templates are module
constants, so that `words` of them, and of the tables, is every word the dataset can hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from blip import keyed
from blip.data.scenes.claims import (
    RELATION_WORDS,
    SIZE_WORDS,
    TEXTURE_TAILS,
    TEXTURE_WORDS,
    matches,
    normal,
    parse,
)
from blip.data.scenes.world import (
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

ROW_WORDS = (("top", "upper"), ("middle",), ("bottom", "lower"))
EDGES = {
    (0, 1): ("at the top", "near the top", "at the top center"),
    (2, 1): ("at the bottom", "near the bottom", "at the bottom center"),
    (1, 0): ("on the left", "on the left side", "at the left edge"),
    (1, 2): ("on the right", "on the right side", "at the right edge"),
    (1, 1): ("in the center", "in the middle"),
}
CORNERS = ("at the {spot}", "in the {spot}", "in the {spot} corner")

ONE = (
    "{a} {at_a}",
    "there is {a} {at_a}",
    "there is only {a} {at_a}",
    "{at_a} there is {a}",
    "{at_a} we see {a}",
    "a picture of {a} {at_a}",
    "this picture shows {a} {at_a}",
    "an image of one {bare} {at_a}",
    "one {bare} {at_a}",
    "{a} is {at_a}",
)
TWO = (
    "{a} {at_a} and {b} {at_b}",
    "{a} {at_a}, {b} {at_b}",
    "{a} {ab} {b}",
    "{a} is {ab} {b}",
    "there is {a} {ab} {b}",
    "{a} {at_a} is {ab} {b}",
    "{a} is {at_a} and {ab} {b}",
    "{at_a} there is {a} {ab} {b}",
    "{a} {at_a} with {b} {ba} it",
    "a picture of {a} {at_a} and {b} {at_b}",
)
THREE = (
    "{a} {ab} {b} and {c} {at_c}",
    "{a} {ab} {b}, {c} {at_c}",
    "{a} is {ab} {b} and {ac} {c}",
    "{a} {at_a}, {b} {bc} {c}",
    "{a} {at_a} and {b} {bc} {c}",
    "{a} with {b} {ba} it and {c} {at_c}",
    "there is {a} {ab} {b} and {c} {at_c}",
)
FOUR = (
    "{a} {ab} {b}, {c} {cd} {d}",
    "{a} {ab} {b} and {c} {cd} {d}",
    "{a} {ab} {b} and {ac} {c}, {d} {at_d}",
)
CAPTIONS = (ONE, TWO, THREE, FOUR)
_PHRASE = re.compile(r"{(\w+)}")
_SAY_LARGE = (0.7, 0.5, 0.25, 0.0)
_SAY_PLAIN = (0.15, 0.1, 0.05, 0.0)


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
        for _ in range(60):
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
        size: how often "large" is said ("small" always is).
        plain: how often "plain" is said (other textures always are).
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


def plain_phrase(thing: Thing) -> str:
    """The canonical phrase for a thing, where an answer must be predictable: "small striped red star"."""
    texture = [] if thing.texture == "plain" else [thing.texture]
    return " ".join([thing.size, *texture, thing.color, thing.shape])


def article(noun: str) -> str:
    """ "a star", "an orange star"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def place_phrase(place: tuple[int, int], rng: np.random.Generator) -> str:
    """Where on the grid: "in the upper left corner"."""
    if place in EDGES:
        return pick(rng, EDGES[place])
    spot = f"{pick(rng, ROW_WORDS[place[0]])} {COLUMNS[place[1]]}"
    return pick(rng, CORNERS).format(spot=spot)


def place_name(place: tuple[int, int]) -> str:
    """The one short name of a place, used in answers: "top left", "center", "left"."""
    row, column = ROWS[place[0]], COLUMNS[place[1]]
    if place[0] == 1:
        return column
    return row if place[1] == 1 else f"{row} {column}"


def relation_phrase(a: Thing, b: Thing, rng: np.random.Generator) -> str:
    """A true relation of `a` to `b` in words."""
    true = [name for name in RELATION_WORDS if related(a, name, b)]
    return pick(rng, RELATION_WORDS[pick(rng, true)])


def refer(thing: Thing, scene: Scene, rng: np.random.Generator, hide: Iterable[str] = ()) -> str | None:
    """A phrase that fits `thing` alone, "the small star", without the attributes in `hide`; None: no such.

    Draws among the shortest kinds of phrases that single the thing out.
    """
    hidden = set(hide)
    names = [name for name in ("size", "texture", "color", "shape") if name not in hidden]
    ways: list[tuple[str, ...]] = [(name,) for name in names if name in ("color", "shape")]
    ways += [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    good = [way for way in ways if _unique(thing, scene, way)]
    if not good and len(names) > 2:
        good = [
            way
            for way in (tuple(names), *(tuple(n for n in names if n != out) for out in names))
            if _unique(thing, scene, way)
        ]
    if "place" not in hidden and (not good or rng.random() < 0.2):
        return f"the object {place_phrase(thing.place, rng)}"
    if not good:
        return None
    way = pick(rng, good)
    words = [_word(thing, name, rng) for name in ("size", "texture", "color") if name in way]
    return " ".join(["the", *words, thing.shape if "shape" in way else "object"])


def words(texts: Iterable[str]) -> set[str]:
    """The words of texts and templates, placeholders left out."""
    return {word for text in texts for word in normal(_PHRASE.sub(" ", text)).split()}


def vocabulary() -> set[str]:
    """Every word that phrases and captions can hold."""
    texts: list[str] = []
    for table in (SIZE_WORDS, TEXTURE_WORDS, TEXTURE_TAILS, RELATION_WORDS):
        texts += [text for several in table.values() for text in several]
    texts += [text for several in (*CAPTIONS, *EDGES.values(), *ROW_WORDS, CORNERS) for text in several]
    return words([*texts, *COLORS, *SHAPES, *ROWS, *COLUMNS, "a an the object"])


def _word(thing: Thing, name: str, rng: np.random.Generator) -> str:
    if name == "size":
        return pick_weighted(rng, SIZE_WORDS[thing.size], (0.6, 0.25, 0.15))
    return pick(rng, TEXTURE_WORDS[thing.texture]) if name == "texture" else thing.color


def _unique(thing: Thing, scene: Scene, names: Iterable[str]) -> bool:
    return sum(all(getattr(other, n) == getattr(thing, n) for n in names) for other in scene.things) == 1


def _draft(scene: Scene, rng: np.random.Generator) -> str:
    things = shuffled(rng, scene.things)
    count = len(things)
    names = [noun_phrase(thing, rng, _SAY_LARGE[count - 1], _SAY_PLAIN[count - 1]) for thing in things]

    def phrase(slot: re.Match[str]) -> str:
        key = slot[1]
        if key == "bare":
            return names[0]
        if key.startswith("at_"):
            return place_phrase(things["abcd".index(key[3])].place, rng)
        first, *second = ("abcd".index(letter) for letter in key)
        if second:
            return relation_phrase(things[first], things[second[0]], rng)
        return names[first] if count == 4 else article(names[first])

    return _PHRASE.sub(phrase, pick(rng, CAPTIONS[count - 1]))
