"""LAVIS's image processors by name, and their augmentation on PIL and NumPy with a generator of one's own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from blip.errors import ConfigError
from blip.registry import PROCESSORS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
GREY = 128
RATIO = (3 / 4, 4 / 3)


@dataclass
class ImageProcessor(ABC):
    """Picture -> square tensor. Subclasses choose the pixels; normalisation is the same for all."""

    image_size: int = 384
    """Height and width of the result in pixels."""
    mean: list[float] | None = None
    """Mean of red, green and blue in [0, 1]; None: CLIP's."""
    std: list[float] | None = None
    """Standard deviation likewise."""
    random: ClassVar[bool] = False
    """Whether a picture becomes something else each time."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"image_size: {self.image_size} is no size in pixels; BLIP uses 224 to 490")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != 3:
                raise ConfigError(f"{key}: {list(values)} is not one value each for red, green and blue")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"std: {list(self.std)} must be above 0")

    def __call__(self, image: Image.Image, rng: Generator | None = None) -> Tensor:
        """float32 (3, H, W), normalised: what LAVIS's processor of the same name returns."""
        mean, std = self.norm()[:, :, None, None]
        return (self.pixels(image, rng).to(torch.float32) / 255 - mean) / std

    def pixels(self, image: Image.Image, rng: Generator | None = None) -> Tensor:
        """uint8 (3, H, W), before normalisation.

        Args:
            image: any mode; see `to_rgb`.
            rng: source of all randomness; None takes a fresh, unseeded one.
        """
        array = self.arrange(to_rgb(image), np.random.default_rng() if rng is None else rng)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    def norm(self) -> Tensor:
        """float32 (2, 3): mean and std in units of [0, 1], as `blip.batch.normalize` takes them."""
        return torch.from_numpy(np.array([self.mean or CLIP_MEAN, self.std or CLIP_STD], dtype=np.float32))

    @abstractmethod
    def arrange(self, image: Image.Image, rng: Generator) -> np.ndarray:
        """uint8 (H, W, 3) of an RGB image, not shared with it."""


@dataclass
class RandomCropProcessor(ImageProcessor):
    """A crop of random area and aspect ratio (3/4 to 4/3), resized; then what the subclass adds."""

    min_scale: float = 0.5
    """Smallest share of the picture's area that is cropped. BLIP's own pre-training used 0.2."""
    max_scale: float = 1.0
    """Largest share."""
    random: ClassVar[bool] = True
    flip: ClassVar[float] = 0.5
    augment: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ConfigError(
                f"min_scale, max_scale: {self.min_scale} and {self.max_scale} must rise within 0 and 1"
            )

    def arrange(self, image: Image.Image, rng: Generator) -> np.ndarray:
        """Crop, resize, flip, augment."""
        scale = (self.min_scale, self.max_scale)
        left, top, width, height = crop_box(image.width, image.height, scale, RATIO, rng)
        # Cropping first keeps the bicubic filter inside the crop, as torchvision does; resize(box=) does not.
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        if self.flip and rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment:
            image = rand_augment(image, rng)
        return np.array(image)


@PROCESSORS.register("blip_image_train")
@dataclass
class BlipImageTrain(RandomCropProcessor):
    """BLIP's training pictures: random crop, horizontal flip, RandAugment(2, 5)."""

    augment: ClassVar[bool] = True


@PROCESSORS.register("blip2_image_train")
@dataclass
class Blip2ImageTrain(RandomCropProcessor):
    """BLIP-2's training pictures: random crop and horizontal flip, no RandAugment."""

    image_size: int = 364
    """Height and width of the result in pixels."""


@PROCESSORS.register("clip_image_train")
@dataclass
class ClipImageTrain(RandomCropProcessor):
    """CLIP's training pictures: a mild random crop, no flip."""

    image_size: int = 224
    """Height and width of the result in pixels."""
    min_scale: float = 0.9
    """Smallest share of the picture's area that is cropped."""
    flip: ClassVar[float] = 0.0


@PROCESSORS.register("blip_image_eval")
@dataclass
class BlipImageEval(ImageProcessor):
    """The whole picture squeezed into a square, without a crop."""

    def arrange(self, image: Image.Image, rng: Generator) -> np.ndarray:
        """Resize both sides; nothing is random."""
        return np.array(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))


@PROCESSORS.register("clip_image_eval")
@dataclass
class ClipImageEval(ImageProcessor):
    """The shorter side resized, the longer one cropped in the middle."""

    image_size: int = 224
    """Height and width of the result in pixels."""

    def arrange(self, image: Image.Image, rng: Generator) -> np.ndarray:
        """Resize and cut; nothing is random."""
        # A strip one pixel wide would be blown up to gigabytes, of which only the middle is kept.
        longest = 32 * min(image.size)
        cut = [max(0, (side - longest) // 2) for side in image.size]
        if any(cut):
            image = image.crop((cut[0], cut[1], image.width - cut[0], image.height - cut[1]))
        size, (width, height) = self.image_size, image.size
        if width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(image.crop((left, top, left + size, top + size)))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, first frame, alpha ignored; decodes it where that has not happened.

    Sixteen-bit greys are scaled, and 32-bit ones where they exceed 255; floating point is taken as [0, 1] or
    [0, 255]. Pillow's own conversion would clip them to white.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        values = values >> 8 if image.mode != "I" or values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image), nan=0.0)
        grey = grey * 255 if grey.max(initial=0) <= 1 else grey
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: Generator
) -> tuple[int, int, int, int]:
    """A random (left, top, width, height) inside the picture, drawn as torchvision's RandomResizedCrop does.

    Args:
        scale: range of the crop's share of the area, uniform.
        ratio: range of width / height, uniform in its logarithm.
        rng: source of the draws; ten tries, then the largest central crop within `ratio`.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            return int(rng.integers(0, width - w + 1)), top, w, h
    if width / height < ratio[0]:
        w, h = width, min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


# RandAugment(N=2, M=5) of BLIP. At level 5 Brightness and Sharpness have the factor 1.0, which changes
# nothing; they stay in the list because they take their share of the draws.
OPERATIONS = (
    "Identity",
    "AutoContrast",
    "Brightness",
    "Sharpness",
    "Equalize",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
NUM_OPERATIONS = 2
PROBABILITY = 0.5
SHEAR, TRANSLATE, DEGREES = 0.15, 5.0, 15.0


def rand_augment(
    image: Image.Image,
    rng: Generator,
    operations: Sequence[str] = OPERATIONS,
    probability: float = PROBABILITY,
) -> Image.Image:
    """Two operations drawn with replacement, each applied with this probability and a random sign."""
    for name in rng.choice(operations, NUM_OPERATIONS):
        if rng.random() < probability:
            image = apply_operation(str(name), image, 1 if rng.random() < 0.5 else -1)
    return image


def apply_operation(name: str, image: Image.Image, sign: int = 1) -> Image.Image:
    """One operation of `OPERATIONS` at level 5 of 10; `sign` turns shears, shifts and rotations around."""
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    if name == "Equalize":
        return ImageOps.equalize(image)
    if name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
        return _warp(image, _source_matrix(name, sign, image.width, image.height))
    return image


def _source_matrix(name: str, sign: int, width: int, height: int) -> np.ndarray:
    """float64 (2, 3): where a pixel of the result comes from, pixel centres at whole numbers."""
    if name == "Rotate":  # sign +1 turns counter-clockwise about (W/2, H/2)
        angle = math.radians(sign * DEGREES)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    matrix = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    row, column, value = {
        "ShearX": (0, 1, -SHEAR),
        "ShearY": (1, 0, -SHEAR),
        "TranslateX": (0, 2, TRANSLATE),
        "TranslateY": (1, 2, TRANSLATE),
    }[name]
    matrix[row, column] = sign * value
    return matrix


def _warp(image: Image.Image, matrix: np.ndarray) -> Image.Image:
    """Bilinear, grey outside. Pillow's own transform would round down and repeat the border.

    Args:
        image: RGB.
        matrix: see `_source_matrix`.
    """
    width, height = image.size
    x, y = np.arange(width), np.arange(height)[:, None]
    # torch counts in half pictures from the centre: pixel x lies at (2x + 1) / W - 1. Element by element, so
    # that no number of threads changes a bit.
    columns, rows = (a * x + (b * y + c) for a, b, c in matrix)  # (H, W) each
    grid = np.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], axis=-1).astype(np.float32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(torch.float32) - GREY
    warped = functional.grid_sample(
        pixels, torch.from_numpy(grid)[None], "bilinear", "zeros", align_corners=False
    )
    rounded = (warped[0] + (GREY + 0.5)).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(rounded.contiguous().numpy())
