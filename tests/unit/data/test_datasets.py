from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip.data.datasets import MAX_SUBSTITUTES, PairDataset
from blip.data.records import PackedRecords
from blip.data.samples import MALFORMED, BadRecord, SampleMaker
from blip.errors import DataError
from blip.processors.image import Blip2ImageTrain
from blip.processors.text import BlipCaption

TRAIN = SampleMaker(Blip2ImageTrain(image_size=8), BlipCaption())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def packed(folder: Path, *records: tuple[str, Any]) -> PackedRecords:
    return PackedRecords(
        [{"image": f"{image}.png", "caption": caption} for image, caption in records], [str(folder)]
    )


def pairs(folder: Path, *records: tuple[str, Any], **options: Any) -> PairDataset:
    return PairDataset("mine", packed(folder, *records), TRAIN, **options)


def test_every_caption_is_a_sample_of_its_picture(folder: Path) -> None:
    dataset = pairs(folder, ("a", ["one", "two"]), ("b", "three"), ("a", "four"), ("c", ["five"]))
    table = [
        (s["text_input"], s["image_id"], s["instance_id"]) for s in map(dataset.sample, range(len(dataset)))
    ]
    assert table == [
        ("one", 0, "mine/0"),
        ("two", 0, "mine/0#1"),
        ("three", 1, "mine/1"),
        ("four", 0, "mine/2"),
        ("five", 2, "mine/3"),
    ]
    assert dataset.num_images == 3


def test_without_image_ids_there_are_none(folder: Path) -> None:
    assert "image_id" not in pairs(folder, ("a", "x"), image_ids=False)[0]


def test_augmentation_is_a_function_of_seed_epoch_and_number(folder: Path) -> None:
    dataset = pairs(folder, ("a", ["x", "y"]), ("b", "z"))
    assert torch.equal(dataset.sample(0, 1, 2)["image"], dataset.sample(0, 1, 2)["image"])
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset.sample(2, 5, 6)["image"], copy.sample(2, 5, 6)["image"])
    views = [dataset.sample(*key)["image"] for key in ((0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2))]
    assert not any(torch.equal(views[0], view) for view in views[1:])


def test_a_number_out_of_range_is_refused(folder: Path) -> None:
    dataset = pairs(folder, ("a", ["x", "y"]))
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"mine has 2 samples; there is no number {index}"):
            dataset.sample(index)
    assert len(list(dataset)) == 2


def test_a_bad_record_is_named_with_its_cause(folder: Path) -> None:
    records = [
        {"image": "cut.png", "caption": "x"},
        {"image": "none.png", "caption": "x"},
        {"caption": "x"},
        {"image": "a.png"},
        {"image": "a.png", "caption": []},
        {"image": "a.png", "caption": ["fine", "!!"]},
        {MALFORMED: "line 3: not valid JSON"},
    ]
    dataset = PairDataset("mine", PackedRecords(records, [str(folder)], files=["list.json"]), TRAIN)
    found, details = {}, []
    for index in range(len(dataset)):
        try:
            dataset.sample(index)
        except BadRecord as error:
            found[error.name] = error.cause
            details.append(error.detail)
    assert all(detail.startswith("list.json[") for detail in details)
    assert found == {
        "mine/0": "truncated_image",
        "mine/1": "missing_image",
        "mine/2": "missing_image",
        "mine/3": "no_caption",
        "mine/4": "no_caption",
        "mine/5#1": "no_caption",
        "mine/6": "malformed_record",
    }
    assert len(dataset) == 8


def test_a_bad_record_is_replaced_by_a_choice_of_seed_epoch_and_number(folder: Path) -> None:
    dataset = pairs(folder, ("a", "a"), ("cut", "bad"), *[(x, x) for x in "bcdef"])
    sample, bad = dataset.sample_or_substitute(0, 3, 4)
    assert (sample["text_input"], bad) == ("a", [])
    assert torch.equal(sample["image"], dataset.sample(0, 3, 4)["image"])

    keys = [(epoch, seed) for epoch in range(6) for seed in range(6)]
    first, again = ([dataset.sample_or_substitute(1, *key) for key in keys] for _ in range(2))
    assert [s["text_input"] for s, _ in first] == [s["text_input"] for s, _ in again]
    assert len({s["text_input"] for s, _ in first}) >= 4
    for sample, bad in first:
        assert {(e.cause, e.name) for e in bad} == {("truncated_image", "mine/1")}
        assert sample["text_input"] != "bad"


def test_a_dataset_without_good_records_stops(folder: Path) -> None:
    dataset = pairs(folder, ("cut", "x"), ("none", "y"))
    with pytest.raises(
        DataError, match=rf"^datasets\.mine: {MAX_SUBSTITUTES + 1} records in a row .*missing_image"
    ) as e:
        dataset.sample_or_substitute(0, 0, 0)
    assert not isinstance(e.value, BadRecord)
