"""Noisy captions like those of the web, with the truth about each known."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from blip import keyed
from blip.data.scenes.claims import matches, normal, parse
from blip.data.scenes.text import caption, words
from blip.data.scenes.world import COLORS, HELD_OUT, SHAPES, Scene, pick, pick_weighted, scene, shuffled

RATES = {"clean": 0.5, "wrong": 0.2, "swapped": 0.1, "boilerplate": 0.12, "partial": 0.08}
"""Kind of caption -> its share."""

BOILERPLATE = (
    "image {n} jpg",
    "image {n} stock photo",
    "stock photo {n} royalty free",
    "click to enlarge the image",
    "click here to view photo {n}",
    "photo {n} of {n}",
    "free wallpaper download {n} x {n}",
    "download free picture {n} png",
    "thumbnail {n} home page",
    "buy now with free shipping",
    "no description available",
    "untitled design {n}",
    "uploaded by user {n}",
    "view product page {n}",
)
PARTIAL = ("{x}", "{x} photo", "{x} image", "picture of {x}", "{x} stock photo", "image {n} {x}")
NUMBERS = ("1", "2", "3", "5", "7", "10", "12", "24", "48", "100", "365", "512", "640", "768", "1024", "2048")


@dataclass(frozen=True)
class WebText:
    """A web caption, what was done to it, and the clean one it was made from."""

    text: str
    kind: str
    clean: str


def web_text(one: Scene, seed: int, total: int) -> WebText:
    """The caption of web scene `one` of `total`; the kind is a function of (seed, index)."""
    rng = keyed.generator(seed, "web text", one.index)
    clean = caption(one, rng)
    kind = pick_weighted(rng, tuple(RATES), tuple(RATES.values()))
    if kind == "wrong":
        return WebText(_wrong(one, rng, seed, total), kind, clean)
    if kind == "swapped":
        return WebText(_swapped(one, clean, rng), kind, clean)
    if kind == "boilerplate":
        return WebText(_filled(pick(rng, BOILERPLATE), rng), kind, clean)
    if kind == "partial":
        return WebText(_partial(one, rng), kind, clean)
    return WebText(clean, kind, clean)


def vocabulary() -> set[str]:
    """Every word that web captions add to those of captions."""
    return words([*BOILERPLATE, *PARTIAL, *NUMBERS])


def _wrong(one: Scene, rng: np.random.Generator, seed: int, total: int) -> str:
    """A caption of another web picture that is not true of this one."""
    while True:
        other = scene("web", int(rng.integers(max(total, 2))), seed)
        text = caption(other, rng)
        if other.index != one.index and not matches(parse(text), one, whole=False):
            return text


def _swapped(one: Scene, clean: str, rng: np.random.Generator) -> str:
    """The clean caption with two colors or two shapes exchanged, or one replaced where there are no two."""
    for attempt in range(400):
        domain = pick(rng, (COLORS, SHAPES))
        tokens = re.split(r"(\W+)", clean)
        slots = [i for i, token in enumerate(tokens) if token in domain]
        first, *rest = shuffled(rng, slots)
        second = next((i for i in rest if tokens[i] != tokens[first]), None)
        if second is not None and attempt < 40:  # exchanging may only give held-out pairs
            tokens[first], tokens[second] = tokens[second], tokens[first]
        else:
            tokens[first] = pick(rng, [value for value in domain if value != tokens[first]])
        text = re.sub(r"\b(a|an) (?=(\w))", _agree, "".join(tokens))
        claims = parse(text)
        held_out = any((m.shape, m.color) in HELD_OUT for m in claims.things)
        if not held_out and not matches(claims, one) and normal(text) != normal(clean):
            return text
    raise AssertionError(clean)


def _agree(match: re.Match[str]) -> str:
    return "an " if match[2] in "aeiou" else "a "


def _partial(one: Scene, rng: np.random.Generator) -> str:
    """A color and shape, or less, of one thing."""
    thing = pick(rng, one.things)
    x = pick(rng, (thing.shape, thing.color, f"{thing.color} {thing.shape}"))
    return _filled(pick(rng, PARTIAL).replace("{x}", x), rng)


def _filled(template: str, rng: np.random.Generator) -> str:
    return re.sub(r"{n}", lambda _: pick(rng, NUMBERS), template)
