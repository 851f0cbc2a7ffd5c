"""Which frames of a video are taken, and that all of them are changed alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blip.batch import normalize
from blip.errors import ConfigError
from blip.processors.image import BlipImageEval
from blip.processors.video import AlproVideoEval, AlproVideoTrain, frame_numbers


def noise(seed: int, size: tuple[int, int] = (20, 14)) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# Which frames


@pytest.mark.parametrize(
    ("total", "wanted", "ends", "starts", "middle"),
    [
        (1, 1, [0], [0], [0]),
        (5, 1, [0], [0], [2]),
        (2, 4, [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]),
        (4, 4, [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]),
        (5, 4, [0, 1, 2, 4], [0, 1, 2, 3], [0, 1, 3, 4]),
        (10, 4, [0, 3, 6, 9], [0, 2, 5, 7], [1, 3, 6, 8]),
        (
            100,
            8,
            [0, 14, 28, 42, 56, 70, 84, 99],
            [0, 12, 25, 37, 50, 62, 75, 87],
            [6, 18, 31, 43, 56, 68, 81, 93],
        ),
    ],
)
def test_the_table_of_frames(
    total: int, wanted: int, ends: list[int], starts: list[int], middle: list[int]
) -> None:
    assert frame_numbers(total, wanted, "ends") == ends
    assert frame_numbers(total, wanted, "starts") == starts
    assert frame_numbers(total, wanted, "middle") == middle


def test_ends_and_starts_are_what_numpy_gives() -> None:
    for total in range(8, 400, 7):
        assert frame_numbers(total, 8, "ends") == [int(x + 1e-9) for x in np.linspace(0, total - 1, 8)]
        assert frame_numbers(total, 8, "starts") == [int(x + 1e-9) for x in np.arange(8) * total / 8]


def test_halves_takes_as_many_from_either_half_none_twice_and_the_same_for_the_same_key() -> None:
    seen = set()
    for seed in range(50):
        for total, wanted in ((9, 8), (40, 5), (7, 1)):
            found = frame_numbers(total, wanted, "halves", np.random.default_rng(seed))
            assert found == frame_numbers(total, wanted, "halves", np.random.default_rng(seed))
            assert found == sorted(set(found))
            assert 0 <= found[0] <= found[-1] < total
            assert sum(number < total // 2 for number in found) == wanted // 2
            seen.add(tuple(found))
    assert len(seen) > 50


# What becomes of them


def test_a_frame_is_squeezed_as_a_picture_is() -> None:
    frames = [noise(seed) for seed in range(5)]
    clip = AlproVideoEval(image_size=8, n_frms=3).clip(frames[:3])
    picture = BlipImageEval(image_size=8)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip, torch.stack([picture.pixels(frame) for frame in frames[:3]]))


def test_training_changes_all_frames_alike_and_each_video_in_another_way() -> None:
    processor = AlproVideoTrain(image_size=16, n_frms=4)
    clips = [processor.clip([noise(0)] * 4, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert all(torch.equal(clips[0][0], frame) for frame in clips[0])
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_colors_stay_red_green_blue() -> None:
    frame = Image.new("RGB", (4, 4), (200, 100, 50))
    assert AlproVideoEval(image_size=2, n_frms=1).clip([frame])[0, :, 0, 0].tolist() == [200, 100, 50]


def test_a_called_processor_chooses_squeezes_and_normalises_as_a_batch_does() -> None:
    frames, processor = [noise(seed) for seed in range(7)], AlproVideoEval(image_size=8, n_frms=3)
    found = processor(frames)
    stored = processor.clip([frames[0], frames[3], frames[6]])
    assert found.shape == (3, 3, 8, 8)
    assert torch.equal(found, normalize(stored[None], processor.norm()[None])[0])
    assert torch.equal(processor(frames[3]), found[1])


def test_a_batch_of_videos_is_normalised_as_its_pictures_are() -> None:
    norm = torch.rand(2, 2, 3) + 0.5
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    each = torch.stack([normalize(clips[:, frame], norm) for frame in range(4)], dim=1)
    assert torch.equal(normalize(clips, norm), each)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n_frms": 0}, "n_frms: 0 is no number of frames"),
        ({"n_frms": "8"}, "n_frms: 8 is no number of frames"),
        ({"sampling": "start"}, "sampling: no way 'start'; did you mean 'starts'"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        AlproVideoEval(**options)  # type: ignore[arg-type]
