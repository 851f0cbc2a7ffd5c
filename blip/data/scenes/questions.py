"""Questions about scenes, each with one right answer, balanced so that guessing blindly does not pay.

Yes/no questions are drawn by answer first; most negatives recombine what is in the picture. No question of
the training split names a held-out pair of shape and color.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np

from blip.data.scenes.claims import RELATION_WORDS
from blip.data.scenes.text import article, place_name, refer, words
from blip.data.scenes.world import (
    COLORS,
    HELD_OUT,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    pick,
    pick_weighted,
    related,
    shuffled,
)

Question = tuple[str, str]
"""(question, answer)."""

FORMS: dict[str, tuple[str, ...]] = {
    "exist": (
        "is there {x}?",
        "is there {x} in the picture?",
        "do you see {x}?",
        "does the picture show {x}?",
    ),
    "color": ("what color is {x}?", "what is the color of {x}?", "which color does {x} have?"),
    "shape": ("what shape is {x}?", "what is the shape of {x}?", "which shape does {x} have?"),
    "count": ("how many {x} are there?", "how many {x} are in the picture?", "how many {x} do you see?"),
    "size": ("what size is {x}?", "is {x} small or large?", "is {x} large or small?"),
    "texture": (
        "what pattern does {x} have?",
        "is {x} plain, striped or dotted?",
        "which pattern is on {x}?",
    ),
    "relation": ("is {x} {link} {y}?",),
    "side": ("is {x} left or right of {y}?", "on which side of {y} is {x}?"),
    "position": ("where is {x}?", "where in the picture is {x}?", "at which place is {x}?"),
    "compare": ("do {x} and {y} have the same {what}?", "are {x} and {y} of the same {what}?"),
    "larger": ("is {x} larger than {y}?", "is {x} smaller than {y}?"),
}
TYPES = tuple(FORMS)
ANSWERS = ("yes", "no")
_SAME = {"color": "color", "shape": "shape", "size": "size", "texture": "pattern"}


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """Up to `count` (type, question, answer), each of another type; fewer where the scene allows no more."""
    found = []
    for kind in shuffled(rng, TYPES):
        asked = question(scene, kind, rng)
        if asked is not None:
            found.append((kind, *asked))
        if len(found) == count:
            break
    return found


def question(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """One question of type `kind` with its answer; None where the scene allows none."""
    return _MAKERS[kind](scene, rng)


def vocabulary() -> set[str]:
    """Every word that questions and answers add to those of phrases."""
    plurals = [_plural(shape) for shape in SHAPES]
    return words([form for several in FORMS.values() for form in several]) | words(
        [*ANSWERS, *plurals, *_SAME.values(), "objects 0 1 2 3 4"]
    )


def answers() -> list[str]:
    """Every answer that a question can have, sorted."""
    places = [place_name((row, column)) for row in range(3) for column in range(3)]
    numbers = [str(number) for number in range(5)]
    return sorted({*ANSWERS, *numbers, *places, *SHAPES, *COLORS, *SIZES, *TEXTURES})


def attribute(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[Thing, Question] | None:
    """A thing and a question for its color, shape, size, texture or position."""
    thing = pick(rng, scene.things)
    hide = {"color": ("color",), "shape": ("shape",), "size": ("size",), "texture": ("texture",)}.get(
        kind, ("place",)
    )
    x = refer(thing, scene, rng, hide)
    if x is None:
        return None
    answer = place_name(thing.place) if kind == "position" else str(getattr(thing, kind))
    return thing, (pick(rng, FORMS[kind]).format(x=x), answer)


def absent(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """A (shape, color) that the scene lacks, mostly made of a shape and a color that it has."""
    here = {(t.shape, t.color) for t in scene.things}
    shapes, colors = sorted({s for s, _ in here}), sorted({c for _, c in here})
    for _ in range(20):
        mode = rng.random()
        shape = pick(rng, shapes if mode < 0.75 else SHAPES)
        color = pick(rng, colors if mode < 0.5 or mode >= 0.75 else COLORS)
        barred = scene.split in ("train", "web") and (shape, color) in HELD_OUT
        if (shape, color) not in here and not barred:
            return shape, color
    return None


def _exist(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = pick(rng, scene.things)
    yes = rng.random() < 0.5
    if rng.random() < 0.7:
        pair = (thing.shape, thing.color) if yes else absent(scene, rng)
        if pair is None:
            return None
        x = f"{pair[1]} {pair[0]}"
    else:  # by size or texture
        name, values = pick(rng, (("size", SIZES), ("texture", TEXTURES)))
        rest = [
            v for v in values if v not in {getattr(t, name) for t in scene.things if t.shape == thing.shape}
        ]
        if not yes and not rest:
            return None
        x = f"{getattr(thing, name) if yes else pick(rng, rest)} {thing.shape}"
    return pick(rng, FORMS["exist"]).format(x=article(x)), "yes" if yes else "no"


def _attribute(kind: str) -> Callable[[Scene, np.random.Generator], Question | None]:
    def make(scene: Scene, rng: np.random.Generator) -> Question | None:
        found = attribute(scene, kind, rng)
        return found[1] if found else None

    return make


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    things = scene.things
    tallies: dict[str, int] = {}
    if rng.random() < 0.25:
        tallies["objects"] = len(things)
    else:
        for name, values in (("shape", SHAPES), ("color", COLORS), ("size", SIZES), ("texture", TEXTURES)):
            for value in values:
                noun = _plural(value) if name == "shape" else f"{value} objects"
                tallies[noun] = sum(getattr(t, name) == value for t in things)
    # Answers first, larger ones more often, since pictures with three of a kind are rarer.
    numbers = sorted(set(tallies.values()))
    weights = np.array([(1.0, 1.0, 2.5, 4.0, 5.0)[number] for number in numbers])
    number = pick_weighted(rng, numbers, (weights / weights.sum()).tolist())
    noun = pick(rng, sorted(noun for noun, tally in tallies.items() if tally == number))
    return pick(rng, FORMS["count"]).format(x=noun), str(number)


def _pair(
    scene: Scene, rng: np.random.Generator, hide: Sequence[str] = ()
) -> list[tuple[Thing, Thing, str, str]]:
    """Ordered pairs of things with their phrases, in random order; places are not used to refer."""
    phrases = {t: refer(t, scene, rng, (*hide, "place")) for t in scene.things}
    pairs = [(a, b, phrases[a], phrases[b]) for a, b in permutations(scene.things, 2)]
    return [(a, b, x, y) for a, b, x, y in shuffled(rng, pairs) if x and y]


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    for a, b, x, y in _pair(scene, rng):
        vertical = pick(rng, ((("left", "right"), "column"), (("above", "below"), "row")))
        names, axis = vertical
        if getattr(a, axis) == getattr(b, axis):
            continue
        yes = rng.random() < 0.5
        name = next(n for n in names if related(a, n, b) == yes)
        text = FORMS["relation"][0].format(x=x, y=y, link=pick(rng, RELATION_WORDS[name]))
        return text, "yes" if yes else "no"
    return None


def _side(scene: Scene, rng: np.random.Generator) -> Question | None:
    for a, b, x, y in _pair(scene, rng):
        if a.column != b.column:
            return pick(rng, FORMS["side"]).format(x=x, y=y), "left" if a.column < b.column else "right"
    return None


def _compare(scene: Scene, rng: np.random.Generator) -> Question | None:
    name = pick(rng, tuple(_SAME))
    same = rng.random() < 0.5
    for a, b, x, y in _pair(scene, rng, (name,)):
        if (getattr(a, name) == getattr(b, name)) == same:
            # Most pairs differ in shape and color; asking them all would make "no" the safe guess.
            if not same and rng.random() > {"color": 0.35, "shape": 0.35, "size": 0.9, "texture": 0.8}[name]:
                return None
            return pick(rng, FORMS["compare"]).format(x=x, y=y, what=_SAME[name]), "yes" if same else "no"
    return None


def _larger(scene: Scene, rng: np.random.Generator) -> Question | None:
    for a, b, x, y in _pair(scene, rng, ("size",)):
        if a.size != b.size:
            form = pick(rng, FORMS["larger"])
            return form.format(x=x, y=y), "yes" if (a.size == "large") == ("larger" in form) else "no"
    return None


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


_MAKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "exist": _exist,
    "count": _count,
    "relation": _relation,
    "side": _side,
    "compare": _compare,
    "larger": _larger,
    **{kind: _attribute(kind) for kind in ("color", "shape", "size", "texture", "position")},
}
