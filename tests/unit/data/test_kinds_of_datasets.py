"""Datasets of every kind by the ordinary way: a section or a name, its files, batches."""

from __future__ import annotations

import json
import os
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import blip
from blip.data.catalog.table import CATALOG
from blip.data.kinds import TRUTH_VALUES
from blip.data.loader import EvalLoader, LoaderConfig, TrainLoader
from blip.data.locate import MissingData, locate
from blip.data.samples import BadRecord
from blip.data.scenes.make import make_scenes
from blip.data.sources import build_dataset
from blip.errors import ConfigError, DataError
from blip.models.tokenizer import WordPieces
from tests.unit.data.test_sources import put, section, shard

NLVR_DEV = Path(os.environ.get("BLIP_NLVR_DEV", Path(__file__).parents[4] / "shared/data/nlvr-dev"))
"""Sentences that people wrote (Suhr et al., 2017), where there is such a folder."""

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_scenes(root, size=16, train=40, val=4, test=8, web=0, workers=0)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    for name in "abc":
        noise = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"own/{name}.jpg")
    return tmp_path


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in set(one) - {"position"}:
        same = torch.equal(one[key], other[key]) if isinstance(one[key], Tensor) else one[key] == other[key]
        assert same, key


# Training


def loader(root: Path, name: str, **options: Any) -> TrainLoader:
    pieces = WordPieces("scenes")
    tokenize = {"text_input": partial(pieces, max_length=8), "answer": pieces}
    vis = {"train": {"name": "blip_image_train", "image_size": 16}}
    data: Any = build_dataset(name, section(vis_processor=vis), "train", root)
    config = LoaderConfig(**{"batch_size": 4, "pad_id": pieces.pad_id, **options})
    return TrainLoader({name: data}, config, tokenize=tokenize)


KEYS = {
    "scenes_vqa": ["answer", "answer_ids", "answer_mask", "image", "n_answers", "weight"],
    "scenes_nlvr": ["image0", "image1", "label"],
    "scenes_answers": ["image", "label"],
}
COMMON = ["image_norm", "instance_id", "text_ids", "text_input", "text_mask"]


@pytest.mark.parametrize("name", KEYS)
def test_batches_do_not_depend_on_workers_or_ranks_and_resume(scenes: Path, name: str) -> None:
    batches = list(islice(loader(scenes, name), 4))
    own = {key for key in batches[0] if key in (*KEYS[name], *COMMON)}
    assert own == {*KEYS[name], *COMMON}
    for one, other in zip(batches, islice(loader(scenes, name, num_workers=2), 4), strict=True):
        assert_same(one, other)
    resumed = loader(scenes, name)
    resumed.load_state_dict(batches[1]["position"])
    assert_same(next(resumed), batches[2])
    ranks = [next(loader(scenes, name, batch_size=2, world=2, rank=rank)) for rank in range(2)]
    assert [text for part in ranks for text in part["text_input"]] == batches[0]["text_input"]
    for key in ("weight", "n_answers", "label", "image", "image0", "image1"):
        if key in own:
            assert torch.equal(torch.cat([part[key] for part in ranks]), batches[0][key]), key


def test_answers_of_own_questions_are_weighted(root: Path) -> None:
    records = [
        {"image": "a.jpg", "question": "What?", "answer": ["x", "y", "x", "x"]},
        {"image": "b.jpg", "question": "Who (there)?", "answer": "z"},
        {"image": "c.jpg", "question": "Why?"},
    ]
    put(root / "own/list.json", records)
    data: Any = build_dataset("mine", section(path="own/list.json", answer_weight=0.2), "train", root)
    sample = data[0]
    assert (sample["answer"], sample["weight"]) == (["x", "y"], pytest.approx([0.15, 0.05]))
    assert (data[1]["text_input"], data[1]["weight"], "image_id" in data[1]) == ("who there?", [0.2], False)
    with pytest.raises(BadRecord, match=r"mine/2: no_answer \(.*list\.json\[2\]"):
        data[2]


def test_tables_have_questions_too(root: Path) -> None:
    put(root / "own/list.csv", "image,asked,said\na.jpg,What?,a cat\nb.jpg,Who?,2\n")
    columns = {"question": "asked", "answer": "said"}
    data: Any = build_dataset("mine", section(path="own/list.csv", columns=columns), "train", root)
    assert [(s["text_input"], s["answer"]) for s in data] == [("what?", ["a cat"]), ("who?", ["2"])]


def test_captions_to_train_on_begin_with_the_prompt(root: Path) -> None:
    put(root / "own/list.json", [{"image": "a.jpg", "caption": "A Cat."}])
    texts = {"train": {"name": "blip_caption", "prompt": "a picture of "}, "eval": {"name": "blip_caption"}}
    config = section(path="own/list.json", text_processor=texts)
    train: Any = build_dataset("mine", config, "train", root, wanted="caption")
    assert train[0]["text_input"] == "a picture of a cat"
    judged: Any = build_dataset("mine", config, "train", root, train=False, wanted="caption")
    assert judged.references(0) == ["A Cat."]


def test_data_of_two_kinds_do_not_share_a_batch(scenes: Path) -> None:
    data: Any = {n: build_dataset(n, section(), "train", scenes) for n in ("scenes", "scenes_vqa")}
    with pytest.raises(DataError, match="different keys"):
        TrainLoader(data, LoaderConfig(batch_size=4))


# Classes


def labelled(root: Path, **labels: list[Any]) -> dict[str, str]:
    for split, some in labels.items():
        records = [
            {"image": "a.jpg", "sentence": f"number {n}", "label": label} for n, label in enumerate(some)
        ]
        put(root / f"own/{split}.json", records)
    return {split: f"own/{split}.json" for split in labels}


def classes(root: Path, path: dict[str, str], split: str, **options: Any) -> tuple[list[str], list[int]]:
    config = section(path=path, **options)
    data: Any = build_dataset("mine", config, split, root, split == "train", wanted="classification")
    if split == "train":
        return list(data.maker.classes), [sample["label"] for sample in data]
    return data.classes, [data.label(i) for i in range(len(data))]


def test_classes_are_the_training_labels_in_order_of_name(root: Path) -> None:
    path = labelled(root, train=["wet", "dry", "wet", "hot"], val=["hot", "dry"])
    assert classes(root, path, "train") == (["dry", "hot", "wet"], [2, 0, 2, 1])
    assert classes(root, path, "val") == (["dry", "hot", "wet"], [1, 0])
    assert classes(root, path, "val", max_samples=1) == (["dry", "hot", "wet"], [1])
    assert classes(root, path, "val", classes=["hot", "dry"]) == (["hot", "dry"], [0, 1])


def test_without_training_split_classes_have_to_be_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"datasets\.mine\.classes: not given, .* has none; name them"):
        classes(root, labelled(root, val=["a", "b"]), "val")
    with pytest.raises(ConfigError, match=r"datasets\.mine\.classes: .* has only 'a'"):
        classes(root, labelled(root, train=["a", "a"]), "train")
    assert classes(root, labelled(root, val=[True, False]), "val") == (list(TRUTH_VALUES), [1, 0])


def test_names_of_the_catalogue_have_their_classes_and_suffix(root: Path) -> None:
    row = CATALOG["snli_ve"]
    for split in row.splits:
        (file,) = row.of(split)
        put(root / file, [{"image": "a", "sentence": "A man sleeps.", "label": "entailment"}])
    (root / row.images).mkdir(parents=True)
    (root / "own/a.jpg").rename(root / row.images / "a.jpg")
    data: Any = build_dataset("snli_ve", section(), "val", root, train=False)
    assert (data.classes, data.label(0)) == (["contradiction", "neutral", "entailment"], 2)
    assert Path(data.picture(0)).name == "a.jpg"


def test_answers_to_questions_about_scenes_are_classes(scenes: Path) -> None:
    data: Any = build_dataset("scenes_answers", section(), "test", scenes, train=False)
    stored = json.loads((scenes / "scenes/annotations/vqa_test.json").read_text())
    assert data.bad == []
    assert [data.classes[data.label(i)] for i in range(len(data))] == [record["answer"] for record in stored]


# Answers


def test_candidates_come_from_a_file_or_the_training_split(root: Path) -> None:
    put(root / "own/train.json", [{"image": "a.jpg", "question": "q?", "answer": ["b", "a"]}])
    put(root / "own/val.json", [{"image": "a.jpg", "question": "q?", "answer": "c"}])
    put(root / "lists/answers.json", ["yes", "no"])
    path = {"train": "own/train.json", "val": "own/val.json"}

    def candidates(**options: Any) -> list[str] | None:
        data: Any = build_dataset("mine", section(**options), "val", root, train=False, wanted="vqa")
        return EvalLoader(data, 2).answer_list

    assert candidates(path=path) == ["a", "b"]
    assert candidates(path=path, max_samples=1) == ["a", "b"]
    assert candidates(path=path, answer_list="lists/answers.json") == ["yes", "no"]
    assert candidates(path={"val": "own/val.json"}) is None
    with pytest.raises(MissingData, match=r"datasets\.mine\.answer_list: no file 'nowhere\.json'"):
        candidates(path=path, answer_list="nowhere.json")


@pytest.fixture
def vqa(root: Path) -> Path:
    """COCO's VQA with one question in each file."""
    row = CATALOG["coco_vqa"]
    for split in row.splits:
        for number, file in enumerate(row.of(split)):
            record = {"image": "val2014/a.jpg", "question": f"{split} {number}?", "question_id": number}
            put(root / file, [{**record, "answer": ["x"] * 10} if split == "train" else record])
    put(root / row.answer_list, ["x", "y"])
    found = {"question_id": 0, "answers": [{"answer": "y"}] * 10, "answer_type": "other"}
    put(root / row.official["val"], {"annotations": [found]})
    (root / "coco/images/val2014").mkdir(parents=True)
    (root / "own/a.jpg").rename(root / "coco/images/val2014/a.jpg")
    return root


def test_vqa_of_the_catalogue_has_its_official_files(vqa: Path) -> None:
    train: Any = build_dataset("coco_vqa", section(), "train", vqa, wanted="vqa")
    assert [sample["text_input"] for sample in train] == ["train 0?", "train 1?"]
    val: Any = build_dataset("coco_vqa", section(), "val", vqa, train=False, wanted="vqa")
    assert (val.answers(0), val.answer_type(0), val.answer_list) == (["y"] * 10, "other", ["x", "y"])
    test: Any = build_dataset("coco_vqa", section(), "test", vqa, train=False, wanted="vqa")
    assert (test.answers(0), test.answer_type(0)) == ([], "")
    assert len(blip.load_dataset("coco_vqa", root=vqa)["train"]) == 2


def test_a_missing_official_file_is_named_before_anything_is_read(vqa: Path) -> None:
    row = CATALOG["coco_vqa"]
    (vqa / row.official["val"]).unlink()
    (vqa / row.answer_list).unlink()
    with pytest.raises(MissingData, match=r"annotation_file: no file .*; run 'blip data prepare coco_vqa'"):
        locate("coco_vqa", section(), "val", vqa)
    data: Any = build_dataset("coco_vqa", section(annotation_file=""), "val", vqa, train=False)
    assert data.answers(0) == []
    with pytest.raises(MissingData, match=r"answer_list: no file .*; run 'blip data prepare coco_vqa'"):
        _ = data.answer_list


def test_lavis_lists_the_official_files_behind_the_records(vqa: Path) -> None:
    put(vqa / "lavis/own.json", ["p", "q"])
    put(vqa / "lavis/gt.json", {"annotations": [{"question_id": 0, "answers": [{"answer": "r"}]}]})
    row = CATALOG["coco_vqa"]
    storage = [row.splits["val"], "lavis/own.json", "lavis/questions.json", "lavis/gt.json"]
    info = {"annotations": {"val": {"storage": storage}}, "images": {"storage": "coco/images"}}
    data: Any = build_dataset("coco_vqa", section(build_info=info), "val", vqa, train=False)
    assert (data.answers(0), data.answer_list) == (["r"], ["p", "q"])


def test_pictures_without_captions_can_be_captioned(root: Path) -> None:
    row = CATALOG["nocaps"]
    for split in row.splits:
        put(root / row.of(split)[0], [{"image": "a.jpg", "img_id": 3}])
    official = {
        "images": [{"id": 3, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 3, "caption": "Yes."}],
    }
    put(root / row.official["val"], official)
    (root / "own").rename(root / "nocaps/images")
    val: Any = build_dataset("nocaps", section(), "val", root, train=False, wanted="caption")
    assert (val.image_id(0), val.references(0)) == (3, ["Yes."])
    test: Any = build_dataset("nocaps", section(), "test", root, train=False, wanted="caption")
    assert test.references(0) == []
    assert blip.load_dataset("nocaps", root=root, split="test")["test"][0]["image"].size == (9, 9)
    with pytest.raises(DataError, match="no column 'caption'"):
        build_dataset("nocaps", section(), "test", root, train=False, wanted="retrieval")


# What goes together


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("scenes_vqa", "caption", r"records are of kind vqa, run\.task needs caption;"),
        ("scenes", "vqa", r"records are of kind caption, run\.task needs vqa;"),
        ("scenes_nlvr", "retrieval", r"records are of kind nlvr, run\.task needs caption;"),
        ("scenes", "classification", r"run\.task needs nlvr or classification;"),
    ],
)
def test_a_task_refuses_data_of_another_kind(scenes: Path, name: str, wanted: str, message: str) -> None:
    for train in (True, False):
        with pytest.raises(ConfigError, match=rf"^datasets\.{name}\.kind: its {message}|{message}"):
            build_dataset(name, section(), "test", scenes, train, wanted=wanted)


def test_shards_hold_captions_only(root: Path) -> None:
    shard(root / "own/p0.tar", "ab", root / "own")
    with pytest.raises(
        ConfigError, match=r"datasets\.mine\.kind: shards hold pictures with captions; vqa data"
    ):
        build_dataset("mine", section(path="own/p0.tar", kind="vqa"), "train", root)


def test_a_column_that_the_kind_needs_is_missed_by_name(root: Path) -> None:
    put(root / "own/list.json", [{"image": "a.jpg", "said": "x", "label": 1}])
    with pytest.raises(DataError, match=r"no column 'sentence', only image, said, label; name the one"):
        build_dataset("mine", section(path="own/list.json", kind="nlvr"), "train", root)
    columns = {"sentence": "said"}
    config = section(path="own/list.json", kind="nlvr", columns=columns)
    data: Any = build_dataset("mine", config, "train", root)
    assert (sorted(data[0])[:2], data[0]["label"]) == (["image0", "image1"], 1)


# To look at


def test_every_kind_can_be_looked_at(scenes: Path) -> None:
    asked = blip.load_dataset("scenes_vqa", root=scenes)["train"][0]
    stored = json.loads((scenes / "scenes/annotations/vqa_train.json").read_text())
    assert (asked["text_input"], asked["answer"]) == (stored[0]["question"], [stored[0]["answer"]])
    assert (asked["question_id"], asked["image"].size) == (0, (16, 16))
    told = blip.load_dataset("scenes_nlvr", root=scenes, split="test")["test"]
    pairs = json.loads((scenes / "scenes/annotations/nlvr_test.json").read_text())
    assert [sample["text_input"] for sample in told] == [pair["sentence"] for pair in pairs]
    assert [sample["label"] for sample in told] == [pair["label"] == "True" for pair in pairs]
    assert (told[0]["image0"].size, told[0]["image1"].size) == ((16, 16), (16, 16))
    assert sorted(told[0]) == ["image0", "image1", "instance_id", "label", "text_input"]


@pytest.mark.skipif(not (NLVR_DEV / "dev.json").is_file(), reason="there is no such folder")
def test_sentences_of_people_are_read_as_those_of_nlvr() -> None:
    config = section(path={"val": "dev.json"}, images=".", kind="nlvr", cut=1 / 3)
    data: Any = build_dataset("nlvr_dev", config, "val", NLVR_DEV, train=False, wanted="classification")
    assert (len(data), data.bad, data.classes) == (989, [], ["False", "True"])
    stored = json.loads((NLVR_DEV / "dev.json").read_text())
    assert [data.label(i) for i in range(989)] == [int(record["label"]) for record in stored]
    batch = next(EvalLoader(data, 8).batches())
    assert batch["image0"].shape == batch["image1"].shape == (8, 3, 16, 16)
