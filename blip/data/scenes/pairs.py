"""Sentences about two pictures, true or false, as in NLVR2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blip.data.scenes.text import article, words
from blip.data.scenes.world import COLORS, HELD_OUT, SHAPES, SIZES, TEXTURES, Scene, pick, shuffled

FORMS: dict[str, tuple[str, ...]] = {
    "both": ("both images contain {x}", "there is {x} in each of the two images"),
    "one": ("exactly one of the two images contains {x}", "only one image shows {x}"),
    "neither": ("neither image contains {x}", "there is no {bare} in the two images"),
    "left": ("the left image contains {x}", "there is {x} in the left image"),
    "right": ("the right image contains {x}", "there is {x} in the right image"),
    "total": ("there are {k} objects in the two images", "the two images show {k} objects in total"),
    "more": ("the left image has more objects than the right image",),
    "fewer": ("the left image has fewer objects than the right image",),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
_TRIES = 400


@dataclass(frozen=True)
class Pair:
    """Two scenes and a sentence about them."""

    left: Scene
    right: Scene
    form: str
    sentence: str
    label: bool


def pairs(scenes: Sequence[Scene], rng: np.random.Generator, per_scene: int) -> list[Pair]:
    """`per_scene` pairs that have each of `scenes` on the left; half of the sentences are true.

    The partner, and what the sentence speaks of, are drawn until the wanted label is right, so that neither
    the form of a sentence nor how special its object is gives the label away.
    """
    found: list[Pair] = []
    if len(scenes) < 2:
        return found
    for left in scenes:
        for form in shuffled(rng, tuple(FORMS))[:per_scene]:
            pair = _pair(left, scenes, form, bool(rng.random() < 0.5), rng)
            if pair is not None:
                found.append(pair)
    return found


def vocabulary() -> set[str]:
    """Every word that pair sentences add to those of phrases."""
    return words([form for several in FORMS.values() for form in several]) | words(NUMBERS)


def _pair(
    left: Scene, scenes: Sequence[Scene], form: str, label: bool, rng: np.random.Generator
) -> Pair | None:
    level = pick(rng, (("shape",), ("color",), ("color", "shape"), ("size", "shape"), ("texture", "shape")))
    for _ in range(_TRIES):
        right = pick(rng, scenes)
        if right is left:
            continue
        slots, truth = _claim(left, right, form, level, rng)
        if truth == label:
            return Pair(left, right, form, pick(rng, FORMS[form]).format(**slots), label)
    return None


def _claim(
    left: Scene, right: Scene, form: str, level: tuple[str, ...], rng: np.random.Generator
) -> tuple[dict[str, str], bool]:
    """Slots of the sentence, and whether it is true."""
    counts = len(left.things), len(right.things)
    if form == "total":
        # Near the truth, so that the number alone says nothing about the label.
        number = min(max(sum(counts) + pick(rng, (-2, -1, 0, 0, 1, 2)), 2), 8)
        return {"k": NUMBERS[number]}, number == sum(counts)
    if form in ("more", "fewer"):
        return {}, counts[0] > counts[1] if form == "more" else counts[0] < counts[1]
    values = _object(left, right, level, rng)
    here, there = (
        any(all(getattr(t, n) == v for n, v in values.items()) for t in one.things) for one in (left, right)
    )
    truth = {"both": here and there, "one": here != there, "neither": not here and not there}
    truth |= {"left": here, "right": there}
    noun = " ".join([*values.values(), *([] if "shape" in values else ["object"])])
    return {"x": article(noun), "bare": noun}, truth[form]


def _object(left: Scene, right: Scene, level: tuple[str, ...], rng: np.random.Generator) -> dict[str, str]:
    """Attribute values to speak of: of a thing in one of the pictures, or any."""
    chance = rng.random()
    if chance < 0.8:
        thing = pick(rng, (left if chance < 0.4 else right).things)
        return {name: getattr(thing, name) for name in level}
    domains = {"size": SIZES, "texture": TEXTURES, "color": COLORS, "shape": SHAPES}
    while True:
        values = {name: pick(rng, domains[name]) for name in level}
        if left.split not in ("train", "web") or (values.get("shape"), values.get("color")) not in HELD_OUT:
            return values
