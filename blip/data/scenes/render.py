"""Draws a scene at any size, anti-aliased; NumPy and Pillow only."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from blip import keyed
from blip.data.scenes.world import Scene, Thing

PALETTE = {
    "red": (222, 28, 36),
    "orange": (255, 128, 0),
    "yellow": (255, 224, 28),
    "green": (24, 158, 58),
    "cyan": (38, 208, 224),
    "blue": (36, 76, 226),
    "purple": (134, 44, 186),
    "pink": (255, 134, 196),
}
"""Color name -> RGB."""

_SUPERSAMPLE = 4


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels; the same pixels every time."""
    canvas = _background(scene, size)
    for thing in scene.things:
        _draw(canvas, thing, size)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), "RGB")


def _background(scene: Scene, size: int) -> np.ndarray:
    """float32 (size, size, 3), 0..255."""
    ground = scene.background
    first, second = (np.array(color, np.float32) for color in ground.colors)
    rng = keyed.generator("background", ground.seed)
    if ground.kind == "plain":
        return np.broadcast_to(first, (size, size, 3)).copy()
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    if ground.kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        slope = (axis[None, :] - 0.5) * math.cos(angle) + (axis[:, None] - 0.5) * math.sin(angle)
        share = np.clip(0.5 + slope, 0, 1)[..., None]
        return (first + (second - first) * 1.8 * share).astype(np.float32)
    if ground.kind == "checker":
        cells = int(rng.integers(5, 9))
        odd = (np.floor(axis[None, :] * cells) + np.floor(axis[:, None] * cells)) % 2
        return (first + (second - first) * 0.7 * odd[..., None]).astype(np.float32)
    grain = rng.standard_normal((size, size, 1)).astype(np.float32) * 9
    return first + grain


def _draw(canvas: np.ndarray, thing: Thing, size: int) -> None:
    """Blend `thing` into `canvas` in place."""
    reach = thing.radius * 1.12
    left, right = max(0, int((thing.x - reach) * size)), min(size, int((thing.x + reach) * size) + 2)
    top, bottom = max(0, int((thing.y - reach) * size)), min(size, int((thing.y + reach) * size) + 2)
    scale = size * _SUPERSAMPLE
    offset = np.array([thing.x * scale - left * _SUPERSAMPLE, thing.y * scale - top * _SUPERSAMPLE])
    turn = math.radians(thing.angle)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points = outline(thing.shape) @ rotation * (thing.radius * scale) + offset
    area = ((right - left) * _SUPERSAMPLE, (bottom - top) * _SUPERSAMPLE)
    flat = [tuple(point) for point in points.tolist()]
    inside, edge = Image.new("L", area), Image.new("L", area)
    ImageDraw.Draw(inside).polygon(flat, fill=255)
    width = max(1, round(0.014 * scale))
    ImageDraw.Draw(edge).line([*flat, flat[0], flat[1]], fill=255, width=width, joint="curve")
    cover, rim = _shrink(ImageChops.lighter(inside, edge)), _shrink(edge)
    color = np.array(PALETTE[thing.color], np.float32)
    patch = canvas[top:bottom, left:right]
    patch *= 1 - cover
    patch += color * (cover - 0.45 * rim)
    if thing.texture != "plain":
        marks = Image.fromarray(_marks(thing, area, offset, scale))
        mark = _shrink(ImageChops.darker(ImageChops.subtract(inside, edge), marks))
        patch += (_mark_color(thing.color) - color) * mark


def _shrink(fine: Image.Image) -> np.ndarray:
    """Mean over blocks of `_SUPERSAMPLE` x `_SUPERSAMPLE` pixels, 0..1, float32 (height, width, 1)."""
    return np.asarray(fine.reduce(_SUPERSAMPLE), np.float32)[..., None] / 255


def _marks(thing: Thing, area: tuple[int, int], offset: np.ndarray, scale: int) -> np.ndarray:
    """255 where the texture's stripes or dots are, uint8 (height, width)."""
    width, height = area
    turn = math.radians(thing.grain)
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5 - np.float32(offset[0])) / scale
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5 - np.float32(offset[1])) / scale
    across = x * math.cos(turn) + y * math.sin(turn)
    if thing.texture == "striped":
        across /= 0.078
        return np.where(across - np.floor(across) < 0.46, np.uint8(255), np.uint8(0))
    along = y * math.cos(turn) - x * math.sin(turn)
    # A dot sits on the center, so that even a thin small shape shows one; small shapes take a finer grid.
    period = 0.09 if thing.size == "large" else 0.066
    a, b = (axis - np.rint(axis) for axis in (across / period, along / period))
    return np.where(a * a + b * b < 0.34**2, np.uint8(255), np.uint8(0))


@lru_cache(maxsize=64)
def _mark_color(color: str) -> np.ndarray:
    """Dark marks on light colors, light marks on dark ones."""
    base = np.array(PALETTE[color], np.float32)
    dark = color in ("yellow", "orange", "cyan", "pink")
    return base * 0.22 if dark else base * 0.12 + 255 * 0.88


@lru_cache(maxsize=64)
def outline(shape: str) -> np.ndarray:
    """The polygon of `shape`, float64 (N, 2) as x, y with y down, about one unit around the origin."""
    if shape == "circle":
        return _arc(0, 360, 64) * 0.94
    if shape == "square":
        return np.array([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])
    if shape == "triangle":
        return np.array([(0, -0.98), (0.98, 0.78), (-0.98, 0.78)])
    if shape == "diamond":
        return np.array([(0, -1.08), (0.72, 0), (0, 1.08), (-0.72, 0)])
    if shape == "star":
        angles = np.radians(np.arange(10) * 36 - 90)
        radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.48)
        return np.stack([np.cos(angles) * radii, np.sin(angles) * radii + 0.06], 1)
    if shape == "cross":
        a, b = 0.34, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        return np.array([*corners, (-b, -a), (-a, -a)])
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x / 16.5, (y - 2.5) / 15], 1)
    if shape == "moon":
        outer = _arc(50, 310, 48)
        inner = _arc(310, 50, 40) * (0.78, 0.80) + (0.44, 0)
        inner = inner[(inner[:, 0] < outer[0, 0] + 0.02)]
        return np.concatenate([outer, inner]) * 1.04 + (0.22, 0)
    raise AssertionError(shape)


def _arc(start: float, stop: float, steps: int) -> np.ndarray:
    angles = np.radians(np.linspace(start, stop, steps))
    return np.stack([np.cos(angles), np.sin(angles)], 1)
