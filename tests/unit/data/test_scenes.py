from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip.data.scenes import make as made
from blip.data.scenes.make import Scene, make_scenes, matches, normal, parse, render, scene, vocabulary
from blip.errors import DataError, UsageError

SIZES: dict[str, Any] = {"size": 32, "train": 70, "val": 10, "test": 15, "web": 40}


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / "annotations" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data"), **SIZES, workers=0)


def test_the_bytes_do_not_depend_on_the_workers(folder: Path, tmp_path: Path):
    again = make_scenes(tmp_path, **SIZES, workers=3)
    assert digest(again) == digest(folder)


def test_the_seed_changes_pictures_and_texts(folder: Path, tmp_path: Path):
    other = make_scenes(tmp_path, **SIZES, workers=0, seed=1)
    before, after = digest(folder), digest(other)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_train_captions_are_karpathy_items_two_per_image(folder: Path):
    items = load(folder, "train")
    assert len(items) == 140
    assert Counter(item["image_id"] for item in items) == {f"scenes_{i}": 2 for i in range(70)}
    for first, second in zip(items[::2], items[1::2], strict=True):
        assert first.keys() == {"image", "caption", "image_id"}
        assert first["image"] == second["image"] == f"images/train/{int(first['image_id'][7:]):06d}.png"
        assert normal(first["caption"]) != normal(second["caption"])
        assert matches(parse(first["caption"]), scene("train", int(first["image_id"][7:])))


@pytest.mark.parametrize(("split", "count"), [("val", 10), ("test", 15)])
def test_eval_captions_are_one_per_image_and_agree_with_the_coco_file(folder: Path, split: str, count: int):
    items = load(folder, split)
    assert [item["image"] for item in items] == [f"images/{split}/{i:06d}.png" for i in range(count)]
    assert all(len(item["caption"]) == 1 for item in items)
    truth = load(folder, f"{split}_gt")
    assert [image["file_name"] for image in truth["images"]] == [item["image"] for item in items]
    assert [(a["image_id"], a["caption"]) for a in truth["annotations"]] == [
        (i, item["caption"][0]) for i, item in enumerate(items)
    ]
    assert len({a["id"] for a in truth["annotations"]}) == count


def test_pictures_are_there_as_drawn(folder: Path):
    for split in ("train", "val", "test", "web"):
        files = sorted((folder / "images" / split).iterdir())
        assert len(files) == SIZES[split]
        assert Image.open(files[3]).tobytes() == render(scene(split, 3), 32).tobytes()


def test_questions_have_the_fields_of_vqa_files(folder: Path):
    for split, per_image in (("train", 4), ("val", 5), ("test", 5)):
        items = load(folder, f"vqa_{split}")
        assert [item["question_id"] for item in items] == list(range(len(items)))
        assert len(items) >= 0.9 * per_image * SIZES[split]
        assert all(
            item.keys() == {"question_id", "question", "answer", "image", "dataset", "type"} for item in items
        )
        assert all(item["dataset"] == "scenes" and isinstance(item["answer"], str) for item in items)
        assert all((folder / item["image"]).is_file() for item in items)
        assert len({item["type"] for item in items}) >= 6


def test_instructions_and_pairs_have_their_fields(folder: Path):
    for split in ("train", "val", "test"):
        told = load(folder, f"instruct_{split}")
        assert all(item.keys() == {"image", "text_input", "text_output", "type"} for item in told)
        assert len({item["type"] for item in told}) >= 6
        assert all(item["text_input"] and item["text_output"] for item in told)
        both = load(folder, f"nlvr_{split}")
        assert all(item.keys() == {"images", "sentence", "label", "type"} for item in both)
        assert {item["label"] for item in both} == {"True", "False"}
        assert all((folder / image).is_file() for item in both for image in item["images"])


def test_the_web_annotations_do_not_tell_the_truth(folder: Path):
    items, truth = load(folder, "web"), load(folder, "web_truth")
    assert all(item.keys() == {"image", "caption", "image_id"} for item in items)
    assert [item["image"] for item in items] == [fact["image"] for fact in truth]
    assert all(
        (item["caption"] == fact["clean"]) == (fact["kind"] == "clean")
        for item, fact in zip(items, truth, strict=True)
    )
    assert json.loads((folder / "scenes.json").read_text())["facts"]["web"] == Counter(
        fact["kind"] for fact in truth
    )


def test_records_describe_the_pictures(folder: Path):
    for split in ("train", "val", "test", "web"):
        records = load(folder, f"records_{split}")
        assert [Scene.from_record(record) for record in records] == [
            scene(split, i) for i in range(SIZES[split])
        ]


@pytest.mark.parametrize(("split", "shards"), [("train", 32), ("web", 16)])
def test_shards_hold_the_split_in_order_with_bare_headers(folder: Path, split: str, shards: int):
    captions = {item["image"]: item["caption"] for item in reversed(load(folder, split))}
    keys = []
    paths = sorted((folder / "shards").glob(f"{split}-*.tar"))
    assert [path.name for path in paths] == [f"{split}-{i:05d}.tar" for i in range(shards)]
    for path in paths:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert all((m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in members)
            for picture, note in zip(members[::2], members[1::2], strict=True):
                key = picture.name.removesuffix(".png")
                keys.append(key)
                assert note.name == f"{key}.json"
                image = f"images/{split}/{key}.png"
                content = tar.extractfile(picture).read()
                assert content == (folder / image).read_bytes()
                assert Image.open(io.BytesIO(content)).size == (32, 32)
                assert json.load(tar.extractfile(note))["caption"] == captions[image]
    assert keys == [f"{i:06d}" for i in range(SIZES[split])]


def test_the_vocabulary_covers_every_text(folder: Path):
    known = set(vocabulary())
    for path in (folder / "annotations").glob("*.json"):
        if path.name.startswith("records") or path.name.endswith("_gt.json"):
            continue
        for item in json.loads(path.read_text()):
            for name in ("caption", "question", "answer", "text_input", "text_output", "sentence"):
                text = item.get(name, "")
                words = normal(text if isinstance(text, str) else " ".join(text)).split()
                assert set(words) <= known, (path.name, text)
    assert len(known) < 250


def test_the_same_dataset_is_kept(folder: Path):
    before = (folder / "scenes.json").stat().st_mtime_ns
    assert make_scenes(folder.parent, **SIZES, workers=0) == folder
    assert (folder / "scenes.json").stat().st_mtime_ns == before


def test_another_dataset_is_replaced_only_when_asked(tmp_path: Path):
    small = {"size": 16, "train": 2, "val": 2, "test": 2, "web": 2, "workers": 0}
    place = make_scenes(tmp_path, **small)
    with pytest.raises(DataError, match=r"seed 0 instead of 5.*overwrite"):
        make_scenes(tmp_path, **small, seed=5)
    make_scenes(tmp_path, **small, seed=5, overwrite=True)
    assert json.loads((place / "scenes.json").read_text())["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_folder_with_other_content_is_left_alone(tmp_path: Path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="move it away"):
        make_scenes(tmp_path, **SIZES, overwrite=True)
    assert (tmp_path / "scenes" / "mine.txt").read_text() == "keep"


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(made, "_write_shard", fail)
    with pytest.raises(OSError, match="disk full"):
        make_scenes(tmp_path, **SIZES, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_a_data_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        make_scenes(tmp_path / "file", **SIZES)


@pytest.mark.parametrize("wrong", [{"size": 8}, {"train": -1}])
def test_impossible_sizes_are_refused(tmp_path: Path, wrong: dict[str, int]):
    with pytest.raises(UsageError, match="at least"):
        make_scenes(tmp_path, **{**SIZES, **wrong})


def test_empty_splits_are_fine(tmp_path: Path):
    place = make_scenes(tmp_path, size=16, train=0, val=0, test=1, web=0, workers=0)
    assert load(place, "train") == load(place, "vqa_val") == []
    assert len(load(place, "test")) == 1
