"""Samples of questions, of sentences about one picture and about two."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip.data.datasets import PairDataset
from blip.data.kinds import (
    LabelMaker,
    PairMaker,
    QuestionMaker,
    exchange_sides,
    kind_of,
    label_number,
    sort_labels,
)
from blip.data.records import PackedRecords
from blip.data.samples import MALFORMED, BadRecord
from blip.processors.image import BlipImageEval, BlipImageTrain
from blip.processors.text import BlipCaption, BlipQuestion

EYES = BlipImageEval(image_size=4)


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (8, 6)) -> str:
    Image.new("RGB", size, color).save(path)
    return str(path)


def color(pixels: Tensor) -> tuple[int, ...]:
    return tuple(pixels[:, 0, 0].tolist())


# Questions


def asked(**record: Any) -> dict[str, Any]:
    maker = QuestionMaker(EYES, BlipQuestion(), answer_weight=record.pop("answer_weight", 1.0))
    return dict(maker.content({"question": "What?", **record}, "vqa/0"))


def test_an_answer_weighs_its_share_of_the_annotations() -> None:
    sample = asked(answer=["cat", "dog", "cat", "cat", "Cat", "a dog", "cat", "dog", "cat", "cat"])
    assert sample["answer"] == ["cat", "dog", "Cat", "a dog"]
    assert sample["weight"] == pytest.approx([0.6, 0.2, 0.1, 0.1])
    assert sample["n_answers"] == 4
    assert sample["text_input"] == "what?"


@pytest.mark.parametrize(
    ("record", "answers", "weights"),
    [
        ({"answer": "red"}, ["red"], [1.0]),
        ({"answer": "red", "answer_weight": 0.2}, ["red"], [0.2]),
        ({"answer": 2}, ["2"], [1.0]),
        ({"answers": [{"answer": "a"}, {"answer": "b"}]}, ["a", "b"], [0.5, 0.5]),
        ({"answer": ["a", " ", "b", ""]}, ["a", "b"], [0.5, 0.5]),
    ],
    ids=str,
)
def test_answers_may_be_one_or_several(
    record: dict[str, Any], answers: list[str], weights: list[float]
) -> None:
    sample = asked(**record)
    assert (sample["answer"], sample["weight"]) == (answers, weights)


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({}, "no_answer"),
        ({"answer": []}, "no_answer"),
        ({"answer": "  "}, "no_answer"),
        ({"answer": ["a", None]}, "bad_text"),
        ({"answer": True}, "bad_text"),
        ({"answer": "a", "question": None}, "no_question"),
        ({"answer": "a", "question": "!"}, "no_question"),
        ({"answer": "a", "question": ["x", "y"]}, "bad_text"),
        ({"answer": "a", MALFORMED: "line 1"}, "malformed_record"),
    ],
    ids=str,
)
def test_a_question_that_cannot_be_used_has_its_cause(record: dict[str, Any], cause: str) -> None:
    with pytest.raises(BadRecord) as caught:
        asked(**record)
    assert caught.value.cause == cause


# Two pictures


@pytest.fixture
def nlvr(tmp_path: Path) -> PairDataset:
    """Red on the left, blue on the right."""
    picture(tmp_path / "red.png", (255, 0, 0))
    picture(tmp_path / "blue.png", (0, 0, 255))
    record = {
        "images": ["red.png", "blue.png"],
        "sentence": "Left of the leftmost, not right.",
        "label": "True",
    }
    maker = PairMaker(EYES, BlipCaption(), swap=True)
    return PairDataset("nlvr", PackedRecords([record] * 400, [str(tmp_path)]), maker, image_ids=False)


def test_pictures_change_places_and_the_words_with_them(nlvr: PairDataset) -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    seen = Counter((color(s["image0"]), color(s["image1"]), s["text_input"], s["label"]) for s in nlvr)
    as_told = (red, blue, "left of the leftmost, not right", 1)
    swapped = (blue, red, "right of the leftmost, not left", 1)
    assert set(seen) == {as_told, swapped}
    assert 160 < seen[swapped] < 240


def test_changing_places_is_keyed_by_seed_epoch_and_number(nlvr: PairDataset) -> None:
    def told(epoch: int, seed: int) -> list[str]:
        return [nlvr.sample(i, epoch, seed)["text_input"] for i in range(40)]

    assert told(0, 1) == told(0, 1)
    assert len({tuple(told(*key)) for key in ((0, 1), (1, 1), (0, 2))}) == 3


def test_both_pictures_are_augmented_on_their_own(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    record = {"images": ["a.png", "a.png"], "sentence": "the same twice", "label": True}
    maker = PairMaker(BlipImageTrain(image_size=16), BlipCaption(), swap=True)
    sample = PairDataset("nlvr", PackedRecords([record], [str(tmp_path)]), maker, False)[0]
    assert not torch.equal(sample["image0"], sample["image1"])
    assert sorted(sample) == ["image0", "image1", "image_norm", "instance_id", "label", "text_input"]


def test_evaluation_keeps_the_places(tmp_path: Path) -> None:
    places = [picture(tmp_path / "red.png", (255, 0, 0)), picture(tmp_path / "blue.png", (0, 0, 255))]
    maker = PairMaker(EYES, BlipCaption())
    for seed in range(20):
        record = {"sentence": "left", "label": "False"}
        sample: Any = maker(record, places, "nlvr/0", np.random.default_rng(seed))
        assert (color(sample["image0"]), sample["text_input"], sample["label"]) == ((255, 0, 0), "left", 0)


def test_one_picture_that_holds_both_is_cut(tmp_path: Path) -> None:
    whole = Image.new("RGB", (30, 10), (0, 0, 255))
    whole.paste((255, 0, 0), (0, 0, 10, 10))
    whole.save(tmp_path / "both.png")
    maker = PairMaker(EYES, BlipCaption(), cut=1 / 3)
    record = {"image": "both.png", "sentence": "two boxes", "label": True}
    assert maker.places(record, "x") == ["both.png"]
    sample: Any = maker(record, str(tmp_path / "both.png"), "x", np.random.default_rng(0))
    for key, expected in (("image0", (255, 0, 0)), ("image1", (0, 0, 255))):
        assert (sample[key].permute(1, 2, 0) == torch.tensor(expected, dtype=torch.uint8)).all(), key


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"images": ["a.png"]}, "missing_image"),
        ({"images": ["a.png", None]}, "missing_image"),
        ({"images": "a.png"}, "missing_image"),
        ({}, "missing_image"),
    ],
    ids=str,
)
def test_a_record_without_two_pictures_has_its_cause(record: dict[str, Any], cause: str) -> None:
    with pytest.raises(BadRecord) as caught:
        PairMaker(EYES, BlipCaption()).places(record, "nlvr/0")
    assert caught.value.cause == cause


def test_only_whole_words_are_exchanged() -> None:
    assert exchange_sides("left-hand right, leftmost bright") == "right-hand left, leftmost bright"


# Labels


@pytest.mark.parametrize(
    ("label", "classes", "number"),
    [
        ("True", ("False", "True"), 1),
        (True, ("False", "True"), 1),
        ("false", ("False", "True"), 0),
        (1, ("False", "True"), 1),
        ("0", ("False", "True"), 0),
        ("entailment", ("contradiction", "neutral", "entailment"), 2),
        (" Neutral ", ("contradiction", "neutral", "entailment"), 1),
        (3, ("1", "2", "3"), 2),
        (3, ("a", "b", "c"), None),
        ("-", ("a", "b"), None),
    ],
)
def test_labels_are_names_or_numbers(label: Any, classes: tuple[str, ...], number: int | None) -> None:
    assert label_number(label, classes) == number


def test_class_numbers_follow_the_order_of_labels() -> None:
    assert sort_labels({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert sort_labels({"10", "9", "x"}) == ["10", "9", "x"]


@pytest.mark.parametrize("column", ["sentence", "caption", "text_input"])
def test_a_sentence_may_stand_in_several_columns(column: str) -> None:
    maker = LabelMaker(EYES, BlipCaption(max_words=3), classes=["a", "b"])
    sample = maker.content({column: "One, TWO three four.", "label": "b"}, "x")
    assert sample == {"text_input": "one, two three", "label": 1}
    with pytest.raises(BadRecord, match=r"bad_label \('c' is none of the classes a, b\)"):
        maker.content({column: "x", "label": "c"}, "x")


@pytest.mark.parametrize(
    ("columns", "wanted", "kind"),
    [
        (["image", "caption"], None, "caption"),
        (["image", "caption", "label"], None, "caption"),
        (["image", "caption", "label"], "classification", "classification"),
        (["image", "caption", "label"], "retrieval", "caption"),
        (["image", "sentence", "label"], None, "classification"),
        (["images", "sentence", "label"], None, "nlvr"),
        (["images", "sentence", "label"], "classification", "nlvr"),
        (["image", "question"], None, "vqa"),
        (["image", "question", "caption"], None, "vqa"),
        (["image", "question", "caption"], "caption", "caption"),
        (["image", "question", "answer", "label"], "vqa", "vqa"),
        (["image"], None, "caption"),
        (["image", "question_id", "sentence"], None, "classification"),
    ],
)
def test_the_kind_is_told_by_the_columns_and_the_task(
    columns: list[str], wanted: str | None, kind: str
) -> None:
    assert kind_of(columns, wanted) == kind
