"""Processors against LAVIS's own outputs and against torchvision's transforms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from blip.processors.image import (
    CLIP_MEAN,
    CLIP_STD,
    BlipImageEval,
    ClipImageEval,
    ClipImageTrain,
    crop_box,
)
from blip.registry import PROCESSORS

GOLDENS = Path(__file__).parent / "goldens"
BICUBIC = InterpolationMode.BICUBIC
TO_TENSOR = (transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD))


@pytest.mark.parametrize("kind", ["caption", "question"])
def test_texts_are_those_of_lavis(kind: str) -> None:
    rows = json.loads((GOLDENS / "aux_text_lr.json").read_text())[kind]
    options = [{k: v for k, v in row.items() if k not in ("text", "out")} for row in rows]
    processor = PROCESSORS.get(f"blip_{kind}")
    ours = [processor(**o)(row["text"]) for o, row in zip(options, rows, strict=True)]
    assert ours == [row["out"] for row in rows]
    assert len(rows) >= 18


def test_blip_image_eval_is_that_of_lavis() -> None:
    golden = torch.load(GOLDENS / "aux_images.pt", weights_only=True)
    image = Image.fromarray(golden["raw_uint8"].numpy())
    torch.testing.assert_close(BlipImageEval(image_size=64)(image), golden["eval_64"], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(64, 48), (37, 90), (50, 50), (31, 33)], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (BlipImageEval(image_size=32), [transforms.Resize((32, 32), BICUBIC)]),
        (ClipImageEval(image_size=32), [transforms.Resize(32, BICUBIC), transforms.CenterCrop(32)]),
    ],
    ids=["blip_image_eval", "clip_image_eval"],
)
def test_eval_processors_are_torchvisions_chain(ours: Any, theirs: list[Any], size: tuple[int, int]) -> None:
    image = photograph(*size)
    expected = transforms.Compose([*theirs, *TO_TENSOR])(image)
    torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-6)


def test_a_crop_is_resized_as_torchvision_resizes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(80, 60)
    monkeypatch.setattr("blip.processors.image.crop_box", lambda *args: (7, 3, 41, 33))
    expected = transforms.functional.resized_crop(image, 3, 7, 33, 41, [24, 24], BICUBIC)
    ours = ClipImageTrain(image_size=24).pixels(image, np.random.default_rng(0))
    assert torch.equal(ours, transforms.functional.pil_to_tensor(expected))


@pytest.mark.parametrize("size", [(640, 480), (100, 300), (333, 40), (3, 2)], ids=str)
@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.2, 1.0), (0.9, 1.0)], ids=str)
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    width, height = size
    rng = np.random.default_rng(0)
    ours = np.array([crop_box(width, height, scale, (3 / 4, 4 / 3), rng) for _ in range(2000)], float)
    torch.manual_seed(0)
    image = Image.new("L", size)
    draws = [transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(2000)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in draws], float)

    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2]).max() <= width
    assert (ours[:, 1] + ours[:, 3]).max() <= height
    # Two means of 2000 draws differ by less than 5 standard errors, sqrt(2 / 2000) of the spread each.
    tolerance = 5 * np.sqrt(2 / 2000) * theirs.std(0) + 1e-9
    assert (abs(ours.mean(0) - theirs.mean(0)) <= tolerance).all()
    deviation = abs(np.quantile(ours, [0.1, 0.5, 0.9], axis=0) - np.quantile(theirs, [0.1, 0.5, 0.9], axis=0))
    assert (deviation <= np.maximum(1, 0.15 * np.array([width, height, width, height]))).all()


def photograph(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1))
