"""The world of the embedded dataset: what a scene holds, and which scenes a split has.

A scene is 1 to 4 things on a 3 x 3 grid of places. All of it is a function of (seed, split, index), drawn
through `keyed`, so that any scene can be made alone, in any order and in any process.

Training and web scenes are independent. Validation and test scenes come in groups of `GROUP` siblings: the
same colours and the same shapes, bound, sized, textured and placed differently, so that knowing which
colours and shapes occur does not identify an image. No two groups of a split share colours and shapes.
`HELD_OUT` pairs of shape and color occur in validation and test scenes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np

from blip import keyed
from blip.errors import UsageError, hint

T = TypeVar("T")
Split = Literal["train", "val", "test", "web"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "web")

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "moon")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
RELATIONS = ("left", "right", "above", "below")
BACKGROUNDS = ("plain", "gradient", "noise", "checker")
TONES = ("light", "gray", "dark")

HELD_OUT = frozenset(
    {
        ("star", "red"),
        ("circle", "purple"),
        ("square", "orange"),
        ("heart", "green"),
        ("triangle", "blue"),
        ("moon", "yellow"),
    }
)
"""(shape, color) pairs that no training or web image, caption or question holds."""

GROUP = 5
"""Siblings per group of a validation or test split."""

MAX_THINGS = 4
_COUNT_WEIGHTS = (0.2, 0.3, 0.3, 0.2)
_TEXTURE_WEIGHTS = (0.4, 0.3, 0.3)
_RADII = {"small": (0.108, 0.12), "large": (0.182, 0.202)}
_CENTERS = (0.21, 0.5, 0.79)
_JITTER = 0.035


@dataclass(frozen=True)
class Thing:
    """One object of a scene; lengths are shares of the image's side, y points down."""

    shape: str
    color: str
    size: str
    texture: str
    row: int
    """0 top, 1 middle, 2 bottom."""
    column: int
    """0 left, 1 center, 2 right."""
    x: float
    y: float
    radius: float
    angle: float
    """Rotation in degrees."""
    grain: float
    """Direction of the stripes or of the grid of dots, in degrees."""

    @property
    def place(self) -> tuple[int, int]:
        """(row, column)."""
        return self.row, self.column


@dataclass(frozen=True)
class Background:
    """What is behind the things."""

    kind: str
    tone: str
    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    """Two low-saturation colors; a gradient and a checker use both."""
    seed: int
    """Key of the noise and of the gradient's direction."""


@dataclass(frozen=True)
class Scene:
    """A picture's content, complete enough to draw it at any size."""

    split: str
    index: int
    things: tuple[Thing, ...]
    background: Background

    def record(self) -> dict[str, Any]:
        """The scene as JSON values; `Scene.from_record` is the inverse."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Scene:
        """The scene that `record` describes."""
        ground = record["background"]
        colors = tuple(tuple(color) for color in ground["colors"])
        return cls(
            record["split"],
            record["index"],
            tuple(Thing(**thing) for thing in record["things"]),
            Background(ground["kind"], ground["tone"], colors, ground["seed"]),  # type: ignore[arg-type]
        )


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of `split`; independent of how many scenes the split has."""
    return scenes(split, index, index + 1, seed)[0]


def scenes(split: str, start: int, stop: int, seed: int = 0) -> list[Scene]:
    """Scenes `start` to `stop` of `split`."""
    if split not in SPLITS:
        raise UsageError(f"scenes: no split {split!r}" + hint(split, SPLITS))
    if split in ("train", "web"):
        return [_single(split, index, seed) for index in range(start, stop)]
    groups = _groups(split, -(-stop // GROUP), seed)
    return [groups[index // GROUP][index % GROUP] for index in range(start, stop)]


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Whether `a` is left of, right of, above or below `b`; a matter of columns and rows, never of pixels."""
    if relation in ("left", "right"):
        return a.column < b.column if relation == "left" else a.column > b.column
    return a.row < b.row if relation == "above" else a.row > b.row


def contents(one: Scene) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The colors and the shapes that occur, each sorted with repeats: what siblings share."""
    return tuple(sorted(t.color for t in one.things)), tuple(sorted(t.shape for t in one.things))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of `choices`, all equally likely."""
    return choices[int(rng.integers(len(choices)))]


def pick_weighted(rng: np.random.Generator, choices: Sequence[T], weights: Sequence[float]) -> T:
    """One of `choices` with probabilities `weights`, which sum to one."""
    draw, total = rng.random(), 0.0
    for choice, weight in zip(choices, weights, strict=True):
        total += weight
        if draw < total:
            return choice
    return choices[-1]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """`items` in a random order."""
    return [items[i] for i in rng.permutation(len(items))]


def _single(split: str, index: int, seed: int) -> Scene:
    rng = keyed.generator(seed, "scene", split, index)
    pairs = _pairs(rng, held_out=False)
    return Scene(split, index, _things(rng, pairs), _background(rng))


@lru_cache(maxsize=16)
def _groups(split: str, count: int, seed: int) -> tuple[tuple[Scene, ...], ...]:
    """The first `count` groups; the first ones are the same for any `count`."""
    groups: list[tuple[Scene, ...]] = []
    seen = set()
    for number in range(count):
        for attempt in range(1000):
            rng = keyed.generator(seed, "group", split, number, attempt)
            pairs = _pairs(rng, held_out=True)
            key = tuple(sorted(s for s, _ in pairs)), tuple(sorted(c for _, c in pairs))
            # A group that repeats another's colors and shapes could repeat its scenes, too.
            if key not in seen:
                break
        seen.add(key)
        groups.append(tuple(_siblings(rng, pairs, split, number)))
    return tuple(groups)


def _siblings(
    rng: np.random.Generator, pairs: list[tuple[str, str]], split: str, number: int
) -> Iterator[Scene]:
    shapes, colors = [s for s, _ in pairs], [c for _, c in pairs]
    seen = set()
    for member in range(GROUP):
        while True:
            bound = list(zip(shapes, shuffled(rng, colors), strict=True))
            if len(set(bound)) < len(bound):
                continue
            things = _things(rng, bound)
            facts = frozenset((t.shape, t.color, t.size, t.texture, t.place) for t in things)
            if facts not in seen:
                break
        seen.add(facts)
        yield Scene(split, number * GROUP + member, things, _background(rng))


def _pairs(rng: np.random.Generator, held_out: bool) -> list[tuple[str, str]]:
    """1 to 4 distinct (shape, color); shapes and colors repeat more often than by chance, for counting."""
    count = pick_weighted(rng, (1, 2, 3, 4), _COUNT_WEIGHTS)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        shape, color = pick(rng, SHAPES), pick(rng, COLORS)
        if pairs and rng.random() < 0.2:
            shape = pick(rng, pairs)[0]
        if pairs and rng.random() < 0.2:
            color = pick(rng, pairs)[1]
        if (shape, color) in pairs or (not held_out and (shape, color) in HELD_OUT):
            continue
        pairs.append((shape, color))
    return pairs


def _things(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> tuple[Thing, ...]:
    """Sizes, textures and places for `pairs`, such that no two things overlap."""
    while True:
        sizes = [pick(rng, SIZES) for _ in pairs]
        radii = [float(rng.uniform(*_RADII[size])) for size in sizes]
        for _ in range(8):
            cells = [divmod(int(cell), 3) for cell in rng.permutation(9)[: len(pairs)]]
            centers = [_center(rng, cell, radius) for cell, radius in zip(cells, radii, strict=True)]
            if _apart(centers, radii):
                break
        else:
            continue  # too many large ones: draw the sizes anew
        return tuple(
            Thing(
                shape=shape,
                color=color,
                size=sizes[i],
                texture=pick_weighted(rng, TEXTURES, _TEXTURE_WEIGHTS),
                row=cells[i][0],
                column=cells[i][1],
                x=round(centers[i][0], 4),
                y=round(centers[i][1], 4),
                radius=round(radii[i], 4),
                angle=round(float(rng.uniform(-12, 12)), 2),
                grain=float(pick(rng, (0, 45, 90, 135))),
            )
            for i, (shape, color) in enumerate(pairs)
        )


def _center(rng: np.random.Generator, cell: tuple[int, int], radius: float) -> tuple[float, float]:
    margin = radius + 0.008
    y, x = (float(np.clip(_CENTERS[i] + rng.uniform(-_JITTER, _JITTER), margin, 1 - margin)) for i in cell)
    return x, y


def _apart(centers: list[tuple[float, float]], radii: list[float]) -> bool:
    for i, (ax, ay) in enumerate(centers):
        for j in range(i):
            bx, by = centers[j]
            # Shapes rarely fill their circle towards each other, so circles may just touch.
            if (ax - bx) ** 2 + (ay - by) ** 2 < (0.97 * (radii[i] + radii[j])) ** 2:
                return False
    return True


def _background(rng: np.random.Generator) -> Background:
    tone = pick(rng, TONES)
    low, high = {"light": (0.84, 0.95), "gray": (0.52, 0.64), "dark": (0.15, 0.25)}[tone]
    base = _tint(rng, float(rng.uniform(low, high)))
    step = 0.07 if tone != "light" else -0.09
    other = tuple(int(np.clip(channel + 255 * step, 0, 255)) for channel in base)
    return Background(pick(rng, BACKGROUNDS), tone, (base, other), int(rng.integers(2**31)))  # type: ignore[arg-type]


def _tint(rng: np.random.Generator, level: float) -> tuple[int, int, int]:
    """A color close to gray `level`, leaning slightly to some hue."""
    red, green, blue = (int(np.clip(255 * (level + rng.uniform(-0.035, 0.035)), 0, 255)) for _ in range(3))
    return red, green, blue
