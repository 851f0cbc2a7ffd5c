from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip import keyed
from blip.batch import normalize
from blip.errors import ConfigError
from blip.processors import image as module
from blip.processors.image import (
    CLIP_MEAN,
    CLIP_STD,
    OPERATIONS,
    Blip2ImageTrain,
    BlipImageEval,
    BlipImageTrain,
    ClipImageEval,
    ClipImageTrain,
    apply_operation,
    rand_augment,
    to_rgb,
)
from blip.registry import PROCESSORS

TRAIN = [BlipImageTrain, Blip2ImageTrain, ClipImageTrain]
ALL = [*TRAIN, BlipImageEval, ClipImageEval]


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_defaults_are_those_of_lavis() -> None:
    table = {
        "blip_image_train": (384, 0.5, 1.0, 0.5, True),
        "blip2_image_train": (364, 0.5, 1.0, 0.5, False),
        "clip_image_train": (224, 0.9, 1.0, 0.0, False),
        "blip_image_eval": (384, None, None, None, None),
        "clip_image_eval": (224, None, None, None, None),
    }
    fields = ("image_size", "min_scale", "max_scale", "flip", "augment")
    assert {name: tuple(getattr(PROCESSORS.get(name)(), f, None) for f in fields) for name in table} == table
    torch.testing.assert_close(BlipImageEval().norm(), torch.tensor([CLIP_MEAN, CLIP_STD]))


@pytest.mark.parametrize("processor", ALL)
def test_bytes_normalised_on_the_device_are_what_the_call_gives(processor: Any, picture: Image.Image) -> None:
    processor = processor(image_size=24, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    pixels = processor.pixels(picture, np.random.default_rng(3))
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((3, 24, 24), torch.uint8, True)
    on_device = normalize(pixels[None], processor.norm()[None])[0]
    assert torch.equal(processor(picture, np.random.default_rng(3)), on_device)


@pytest.mark.parametrize("processor", TRAIN)
def test_all_randomness_comes_from_the_generator(processor: Any, picture: Image.Image) -> None:
    processor = processor(image_size=24)
    draws = [processor.pixels(picture, keyed.generator(1, "augment", i)) for i in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    np.random.seed(0)
    torch.manual_seed(0)
    before = (np.random.get_state()[1].copy(), torch.get_rng_state())
    processor.pixels(picture, keyed.generator(1))
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("processor", [BlipImageEval, ClipImageEval])
def test_evaluation_is_not_random(processor: Any, picture: Image.Image) -> None:
    assert torch.equal(processor(image_size=24)(picture), processor(image_size=24)(picture))


def test_half_of_the_training_pictures_are_flipped() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1)))
    pixels = [Blip2ImageTrain(image_size=16).pixels(ramp, keyed.generator(i)).float() for i in range(400)]
    flipped = sum(bool(p[0, :, 0].mean() > p[0, :, -1].mean()) for p in pixels)
    assert 160 <= flipped <= 240  # 4 standard deviations of 10


def test_rand_augment_draws_two_of_ten_and_applies_half(
    monkeypatch: pytest.MonkeyPatch, picture: Image.Image
) -> None:
    applied: list[tuple[str, int]] = []
    note = lambda name, image, sign: applied.append((name, sign)) or image  # noqa: E731
    monkeypatch.setattr(module, "apply_operation", note)
    for i in range(1000):
        rand_augment(picture, keyed.generator(i))
    names = [name for name, _ in applied]
    assert 900 <= len(applied) <= 1100  # 2000 draws, p = 0.5: standard deviation 22
    assert {name: 60 <= names.count(name) <= 140 for name in OPERATIONS} == dict.fromkeys(OPERATIONS, True)
    assert 0.4 < np.mean([sign > 0 for _, sign in applied]) < 0.6


def naive_warp(array: np.ndarray, source: Any) -> np.ndarray:
    """Bilinear interpolation pixel by pixel; whatever lies outside is 128."""
    height, width = array.shape[:2]
    result = np.zeros(array.shape)
    for y in range(height):
        for x in range(width):
            sx, sy = source(x, y)
            left, top = math.floor(sx), math.floor(sy)
            for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                weight = (1 - abs(sx - column)) * (1 - abs(sy - row))
                inside = 0 <= row < height and 0 <= column < width
                result[y, x] += weight * (array[row, column] if inside else 128.0)
    return result


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_warps_are_the_naive_loop(name: str, sign: int) -> None:
    array = np.random.default_rng(1).integers(0, 256, (15, 22, 3), dtype=np.uint8)
    cos, sin = math.cos(math.radians(15)), sign * math.sin(math.radians(15))
    source = {
        "ShearX": lambda x, y: (x - sign * 0.15 * y, y),
        "ShearY": lambda x, y: (x, y - sign * 0.15 * x),
        "TranslateX": lambda x, y: (x + sign * 5, y),
        "TranslateY": lambda x, y: (x, y + sign * 5),
        "Rotate": lambda x, y: (
            11 + cos * (x - 11) - sin * (y - 7.5),
            7.5 + sin * (x - 11) + cos * (y - 7.5),
        ),
    }[name]
    ours = np.asarray(apply_operation(name, Image.fromarray(array), sign))
    # Rounding to whole grey levels, and float32 coordinates at its boundaries.
    np.testing.assert_allclose(ours, naive_warp(array, source), atol=0.51)


@pytest.mark.parametrize("name", ["Identity", "Brightness", "Sharpness"])
def test_level_five_leaves_brightness_and_sharpness_alone(name: str, picture: Image.Image) -> None:
    assert (np.asarray(apply_operation(name, picture)) == np.asarray(picture)).all()


def test_autocontrast_and_equalize_spread_each_channel() -> None:
    array = np.random.default_rng(2).integers(60, 120, (30, 30, 3), dtype=np.uint8)
    array[..., 2] = 77  # one value only: nothing to spread
    stretched = np.asarray(apply_operation("AutoContrast", Image.fromarray(array)))
    low, high = array[..., 0].min(), array[..., 0].max()
    expected = (array[..., 0].astype(float) - low) * 255 / (high - low)
    np.testing.assert_allclose(stretched[..., 0], expected, atol=1.0)  # truncated, not rounded
    equalized = np.asarray(apply_operation("Equalize", Image.fromarray(array)))
    assert np.ptp(equalized[..., 1]) >= 240
    assert (stretched[..., 2] == 77).all()
    assert (equalized[..., 2] == 77).all()


def test_every_mode_becomes_rgb_with_its_brightness() -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    plain = Image.fromarray(rgb)
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    palette.info["transparency"] = 0
    pictures = {
        "L": Image.fromarray(grey),
        "LA": Image.fromarray(grey).convert("LA"),
        "RGBA": plain.convert("RGBA"),
        "CMYK": plain.convert("CMYK"),
        "P": palette,
        "YCbCr": plain.convert("YCbCr"),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "I": Image.fromarray(grey.astype(np.int32) * 257),
        "I small": Image.fromarray(grey.astype(np.int32)),
        "F": Image.fromarray(grey.astype(np.float32) / 255),
        "F large": Image.fromarray(grey.astype(np.float32)),
    }
    assert pictures["I;16"].mode == "I;16"
    worst = {mode: int(abs(np.asarray(to_rgb(p)).astype(int) - rgb).max()) for mode, p in pictures.items()}
    assert worst == dict.fromkeys(pictures, 0) | {"F": worst["F"], "YCbCr": worst["YCbCr"]}
    assert max(worst.values()) <= 1  # two conversions that truncate


def test_a_bilevel_picture_is_black_and_white() -> None:
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert bits.mode == "1"
    assert (np.asarray(to_rgb(bits))[..., 1] == np.eye(8) * 255).all()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (BlipImageEval, {"image_size": 0}, "image_size: 0 is no size"),
        (BlipImageEval, {"mean": [0.5]}, "mean: .* not one value each"),
        (BlipImageEval, {"std": [1.0, 1.0, 0.0]}, "std: .* above 0"),
        (Blip2ImageTrain, {"min_scale": 0.9, "max_scale": 0.5}, "min_scale, max_scale"),
        (Blip2ImageTrain, {"min_scale": 0.0}, "min_scale, max_scale"),
    ],
)
def test_impossible_options_are_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**options)


@pytest.mark.parametrize("processor", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (7, 5)], ids=str)
def test_tiny_and_thin_pictures_pass(processor: Any, size: tuple[int, int]) -> None:
    assert processor(image_size=8).pixels(Image.new("RGB", size), keyed.generator(0)).shape == (3, 8, 8)


def test_an_endless_strip_costs_no_memory_at_evaluation() -> None:
    strip = Image.fromarray(np.tile(np.arange(60000) % 251, (1, 1)).astype(np.uint8))
    middle = Image.fromarray(np.tile(np.arange(60000) % 251, (1, 1)).astype(np.uint8)[:, 29984:30016])
    processor = ClipImageEval(image_size=512)  # 512 x 30 million pixels, were it resized whole
    assert torch.equal(processor.pixels(strip), processor.pixels(middle))
