"""LAVIS's video processors by name: which frames are taken, and one change for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from blip.errors import ConfigError, hint
from blip.processors.image import (
    OPERATIONS,
    BlipImageEval,
    ImageProcessor,
    RandomCropProcessor,
    rand_augment,
)
from blip.registry import PROCESSORS

SAMPLINGS = ("ends", "starts", "middle", "halves")
_OPERATIONS = tuple(name for name in OPERATIONS if name != "AutoContrast")


@dataclass
class VideoProcessor(ImageProcessor):
    """Frames -> uint8 (F, 3, H, W). What is random is drawn once and is the same for all frames.

    `frames` says which frames are wanted, so that only those need to be decoded; `clip` makes the tensor.
    """

    image_size: int = 256
    """Height and width of the result in pixels."""
    n_frms: int = 8
    """Frames per video (F). BLIP takes 8 for retrieval, 16 for questions; InstructBLIP 4."""
    sampling: Literal["ends", "starts", "middle", "halves"] = "ends"
    """Which frames, see `frame_numbers`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n_frms, int) or self.n_frms < 1:
            raise ConfigError(f"n_frms: {self.n_frms} is no number of frames; BLIP takes 8 or 16")
        if self.sampling not in SAMPLINGS:
            raise ConfigError(f"sampling: no way {self.sampling!r}{hint(str(self.sampling), SAMPLINGS)}")

    def frames(self, total: int, rng: Generator | None = None) -> list[int]:
        """Numbers of the wanted frames of a video that has `total`, in order; see `frame_numbers`."""
        return frame_numbers(total, self.n_frms, self.sampling, rng)

    def clip(self, frames: Sequence[Image.Image], rng: Generator | None = None) -> Tensor:
        """uint8 (F, 3, H, W) of F wanted frames, RGB, before normalisation."""
        rng = np.random.default_rng() if rng is None else rng
        seed = int(rng.integers(1 << 62))
        return torch.stack([self.pixels(frame, np.random.default_rng(seed)) for frame in frames])

    def __call__(self, image: Image.Image | Sequence[Image.Image], rng: Generator | None = None) -> Tensor:
        """float32 (F, 3, H, W), normalised, of all frames of a video; of a single picture (3, H, W)."""
        if isinstance(image, Image.Image):
            return super().__call__(image, rng)
        rng = np.random.default_rng() if rng is None else rng
        mean, std = self.norm()[:, :, None, None]
        pixels = self.clip([image[number] for number in self.frames(len(image), rng)], rng)
        return (pixels.to(torch.float32) / 255 - mean) / std


@PROCESSORS.register("alpro_video_eval")
@dataclass
class AlproVideoEval(VideoProcessor, BlipImageEval):
    """Frames at even distances, each squeezed into a square as `blip_image_eval` does with a picture."""


@PROCESSORS.register("alpro_video_train")
@dataclass
class AlproVideoTrain(VideoProcessor, RandomCropProcessor):
    """Frames drawn from both halves; the same crop, flip and two operations of RandAugment for all frames.

    As in LAVIS, no operation is left out by chance, and AutoContrast is not among them.
    """

    sampling: Literal["ends", "starts", "middle", "halves"] = "halves"
    """Which frames, see `frame_numbers`."""
    augment: ClassVar[bool] = False

    def arrange(self, image: Image.Image, rng: Generator) -> np.ndarray:
        """Crop, resize, flip, augment one frame."""
        cropped = Image.fromarray(super().arrange(image, rng))
        return np.array(rand_augment(cropped, rng, _OPERATIONS, probability=1.0))


def frame_numbers(total: int, wanted: int, sampling: str, rng: Generator | None = None) -> list[int]:
    """`wanted` numbers of frames in rising order.

    - `ends`: at even distances from the first frame to the last, i (total - 1) / (wanted - 1) rounded down:
      LAVIS's evaluation.
    - `starts`: the first frame of each of `wanted` equal parts, i total / wanted rounded down: LAVIS's
      `uniform`. BLIP's own script for MSRVTT means the same, but adds up a rounded-down distance.
    - `middle`: the middle one of each part.
    - `halves`: half of them at random from the first half of the video, the others from the second, none
      twice: LAVIS's `headtail`, for training.

    A video of fewer frames gives all of them, and its last one again as often as is missing (LAVIS).

    Args:
        total: frames that there are, at least one.
        wanted: frames to take.
        sampling: one of `SAMPLINGS`.
        rng: source of the draws of `halves`.
    """
    if total <= wanted:
        return [*range(total), *[total - 1] * (wanted - total)]
    if sampling == "ends":
        return [i * (total - 1) // max(wanted - 1, 1) for i in range(wanted)]
    if sampling == "starts":
        return [i * total // wanted for i in range(wanted)]
    if sampling == "middle":
        return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]
    rng = np.random.default_rng() if rng is None else rng
    middle = total // 2
    # Of an odd number, the second half gives one more; it is never the shorter one.
    first = min(wanted // 2, middle)
    drawn = rng.choice(middle, first, replace=False).tolist() if first else []
    drawn += (middle + rng.choice(total - middle, wanted - first, replace=False)).tolist()
    return sorted(drawn)
