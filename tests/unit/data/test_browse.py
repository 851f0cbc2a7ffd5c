"""What `blip.load_dataset` gives: pairs of a picture and a text, by split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import blip
from blip.data.scenes.make import make_scenes
from blip.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_scenes(root, size=32, train=6, val=3, test=2, web=2, workers=0)
    return root


def test_a_dataset_is_its_splits_of_pictures_and_texts(data: Path) -> None:
    found = blip.load_dataset("scenes", root=data)
    listed = json.loads((data / "scenes" / "annotations" / "train.json").read_text())
    train = found["train"]
    assert len(train) == len(listed) > 0
    assert [sample["text_input"] for sample in train] == [item["caption"] for item in listed]
    sample = train[-1]
    assert sample["image"].size == (32, 32)
    assert sample["image_id"] == 5
    assert list(blip.load_dataset("scenes", root=data, split="val")) == ["val"]
    vis, text = blip.load_preprocess("blip2", image_size=32, vit={"patch_size": 8})
    assert vis["eval"](sample["image"]).shape == (3, 32, 32)
    assert text["eval"](sample["text_input"])


def test_shards_are_read_in_stored_order(data: Path) -> None:
    shards = blip.load_dataset("scenes_shards", root=data)["train"]
    stored = list(shards)
    assert len(stored) == len(shards) == 6
    assert stored[0]["image"].size == (32, 32)
    assert stored[0]["text_input"]
    with pytest.raises(DataError, match="shards are read in sequence"):
        shards[0]


def test_own_data_needs_a_path_only(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "mine.csv").write_text("file,words\na.png,A Ball\ngone.png,Nothing\n")
    columns = {"image": "file", "caption": "words"}
    mine = blip.load_dataset("mine", path=str(tmp_path / "mine.csv"), columns=columns)["train"]
    assert [sample["text_input"] for sample in mine] == ["A Ball"]
    with pytest.raises(DataError, match="missing_image"):
        mine[1]
    with pytest.raises(ConfigError, match=r"datasets\.mine\.colums .* did you mean datasets\.mine\.columns"):
        blip.load_dataset("mine", path="mine.csv", colums=columns)


def test_pictures_may_lie_elsewhere_under_lavis_s_name_for_that(tmp_path: Path) -> None:
    (tmp_path / "pictures/val2014").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/val2014/a.jpg")
    (tmp_path / "coco/annotations").mkdir(parents=True)
    record = {"image": "val2014/a.jpg", "caption": "A ball", "image_id": "coco_1"}
    (tmp_path / "coco/annotations/coco_karpathy_train.json").write_text(json.dumps([record]))
    found = blip.load_dataset("coco_caption", root=tmp_path, vis_path=tmp_path / "pictures")
    assert [sample["text_input"] for sample in found["train"]] == ["A ball"]


def test_data_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        blip.load_dataset("scenes", root=tmp_path)
    for part in ("scenes/annotations/train.json", "scenes/annotations/test.json", "blip data make scenes"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="blip data prepare coco_caption"):
        blip.load_dataset("coco_caption", root=tmp_path, split="val")
    with pytest.raises(DataError, match="did you mean 'scenes'"):
        blip.load_dataset("scense", root=tmp_path)
    with pytest.raises(DataError, match="scenes has no split 'valid'; did you mean 'val'"):
        blip.load_dataset("scenes", root=tmp_path, split="valid")
