"""Instruction tasks on scenes: what to do in words, and the one expected output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blip.data.scenes.questions import absent, attribute, question
from blip.data.scenes.text import (
    article,
    caption,
    noun_phrase,
    place_name,
    place_phrase,
    plain_phrase,
    refer,
    relation_phrase,
    words,
)
from blip.data.scenes.world import COLORS, SHAPES, TEXTURES, TONES, Scene, Thing, pick, shuffled

Task = tuple[str, str]
"""(instruction, expected output)."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": (
        "write a short description of the picture.",
        "describe the image briefly.",
        "give a caption for this picture.",
        "what does the image show?",
    ),
    "detail": (
        "describe the picture in detail.",
        "write a detailed description of the image.",
        "name every object with its size, pattern, color and place.",
    ),
    "vqa": (
        "{q}",
        "question: {q} short answer:",
        "answer the question about the picture. {q}",
        "look at the image and answer: {q}",
    ),
    "count": (
        "{q} answer with a number.",
        "count and answer: {q}",
        "{q} give only the number.",
    ),
    "verify": (
        "is this true? {s}.",
        "true or not: {s}. answer yes or no.",
        "does this sentence fit the picture? {s}.",
        "check the statement: {s}.",
    ),
    "locate": (
        "find {x} and say where it is.",
        "give the place of {x}.",
        "point to {x} by naming its place.",
    ),
    "refer": (
        "name the object {at}.",
        "which object is {at}?",
        "describe the object {at}.",
    ),
    "choice": (
        "{q} options: {o}. answer:",
        "question: {q} choose from: {o}.",
        "pick the right answer. {q} {o}?",
    ),
    "compare": (
        "compare two objects. {q} answer yes or no.",
        "{q} answer yes or no.",
    ),
}
TYPES = tuple(TEMPLATES)
DETAIL = "{list} on a {tone} background"
STATEMENTS = ("there is {x}", "the picture shows {x}", "{x} is {link} {y}", "{x} is {at}")


def task(scene: Scene, kind: str, rng: np.random.Generator) -> Task | None:
    """One instruction of type `kind` with its output; None where the scene allows none."""
    made = _MAKERS[kind](scene, rng)
    if made is None:
        return None
    slots, output = made
    return pick(rng, TEMPLATES[kind]).format(**slots), output


def tasks(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """Up to `count` (type, instruction, output), each of another type."""
    found = []
    for kind in shuffled(rng, TYPES):
        made = task(scene, kind, rng)
        if made is not None:
            found.append((kind, *made))
        if len(found) == count:
            break
    return found


def vocabulary() -> set[str]:
    """Every word that instructions add to those of phrases and questions."""
    return words([text for several in TEMPLATES.values() for text in several]) | words(
        [DETAIL, *STATEMENTS, *TONES]
    )


_Made = tuple[dict[str, str], str]


def _caption(scene: Scene, rng: np.random.Generator) -> _Made:
    return {}, caption(scene, rng)


def _detail(scene: Scene, rng: np.random.Generator) -> _Made:
    things = sorted(scene.things, key=lambda thing: thing.place)  # as one reads: rows, then columns
    names = [f"{article(noun_phrase(t, rng, 1, 1))} {place_phrase(t.place, rng)}" for t in things]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return {}, DETAIL.format(list=text, tone=scene.background.tone)


def _vqa(scene: Scene, rng: np.random.Generator) -> _Made | None:
    asked = question(scene, pick(rng, ("color", "shape", "size", "texture", "exist")), rng)
    return asked and ({"q": asked[0]}, asked[1])


def _count(scene: Scene, rng: np.random.Generator) -> _Made | None:
    asked = question(scene, "count", rng)
    return asked and ({"q": asked[0]}, asked[1])


def _compare(scene: Scene, rng: np.random.Generator) -> _Made | None:
    asked = question(scene, pick(rng, ("compare", "larger")), rng)
    return asked and ({"q": asked[0]}, asked[1])


def _verify(scene: Scene, rng: np.random.Generator) -> _Made | None:
    yes = rng.random() < 0.5
    form = pick(rng, STATEMENTS)
    thing, other = (shuffled(rng, scene.things) * 2)[:2]
    if "{link}" in form:
        if other is thing:
            return None
        x, y = (refer(t, scene, rng, ("place",)) for t in (thing, other))
        # The relation the other way round is false of any two things in different rows or columns.
        link = relation_phrase(thing, other, rng) if yes else relation_phrase(other, thing, rng)
        statement = form.format(x=x, y=y, link=link) if x and y else None
    elif "{at}" in form:
        places = [t.place for t in scene.things if t is not thing]
        place = thing.place if yes else pick(rng, places or [(2 - thing.row, 2 - thing.column)])
        x = refer(thing, scene, rng, ("place",))
        false = yes or place != thing.place
        statement = form.format(x=x, at=place_phrase(place, rng)) if x and false else None
    else:
        pair = (thing.shape, thing.color) if yes else absent(scene, rng)
        statement = pair and form.format(x=article(f"{pair[1]} {pair[0]}"))
    return ({"s": statement}, "yes" if yes else "no") if statement else None


def _locate(scene: Scene, rng: np.random.Generator) -> _Made | None:
    thing = pick(rng, scene.things)
    x = refer(thing, scene, rng, ("place",))
    return ({"x": x}, place_name(thing.place)) if x else None


def _refer(scene: Scene, rng: np.random.Generator) -> _Made:
    thing = pick(rng, scene.things)
    return {"at": place_phrase(thing.place, rng)}, plain_phrase(thing)


def _choice(scene: Scene, rng: np.random.Generator) -> _Made | None:
    kind, values = pick(rng, (("color", COLORS), ("shape", SHAPES), ("texture", TEXTURES)))
    found = attribute(scene, kind, rng)
    if found is None:
        return None
    asked, answer = found[1]
    options = shuffled(rng, [answer, *_wrong(scene, found[0], kind, values, rng)])
    return {"q": asked, "o": ", ".join(options)}, answer


def _wrong(
    scene: Scene, thing: Thing, kind: str, values: tuple[str, ...], rng: np.random.Generator
) -> list[str]:
    """Up to three wrong options; those that other things of the scene would answer come first."""
    right = getattr(thing, kind)
    near = {getattr(t, kind) for t in scene.things} - {right}
    others = shuffled(rng, sorted(near)) + shuffled(rng, [v for v in values if v not in near and v != right])
    return others[:3]


_MAKERS: dict[str, Callable[[Scene, np.random.Generator], _Made | None]] = {
    "caption": _caption,
    "detail": _detail,
    "vqa": _vqa,
    "count": _count,
    "verify": _verify,
    "locate": _locate,
    "refer": _refer,
    "choice": _choice,
    "compare": _compare,
}
