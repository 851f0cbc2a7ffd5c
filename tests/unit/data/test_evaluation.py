"""What evaluations see of a split, beside what stands in its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip.data.evaluation import EvalCaptions, EvalLabels, EvalPairs, EvalQuestions
from blip.data.kinds import LabelMaker, PairMaker, QuestionMaker
from blip.data.loader import EvalLoader
from blip.data.records import PackedRecords
from blip.data.samples import MALFORMED, SampleMaker
from blip.data.scenes.make import make_scenes
from blip.data.sources import build_dataset
from blip.data.truth import read_official
from blip.errors import DataError
from blip.processors.image import BlipImageEval
from blip.processors.text import BlipCaption, BlipQuestion
from tests.unit.data.test_sources import section

EVAL = SampleMaker(BlipImageEval(image_size=8), BlipCaption())
ASKED = QuestionMaker(BlipImageEval(image_size=8), BlipQuestion(), answered=False)


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


def plain(folder: Path, *records: dict[str, Any]) -> PackedRecords:
    return PackedRecords(records, [str(folder)])


# Retrieval


def test_evaluation_pairs_are_those_of_lavis(folder: Path) -> None:
    data = EvalPairs(
        "val", packed(folder, ("a", ["A one.", "two"]), ("b", ["three"]), ("a", "four"), ("c", "five")), EVAL
    )
    assert data.text == ["a one", "two", "four", "three", "five"]
    assert data.txt2img == [0, 0, 0, 1, 2]
    assert data.img2txt == [[0, 1, 2], [3], [4]]
    assert len(data) == 3
    assert [data.instance_id(i) for i in range(3)] == ["val/0", "val/1", "val/3"]
    expected = BlipImageEval(image_size=8).pixels(Image.open(folder / "b.png"))
    sample = data.image(1)
    assert torch.equal(sample.pop("image"), expected)
    assert (sample["image_id"], sample["instance_id"], sorted(sample)) == (
        1,
        "val/1",
        ["image_id", "image_norm", "instance_id"],
    )
    assert (data.pair(3)["text_input"], data.pair(3)["image_id"]) == ("three", 1)


def test_unreadable_pictures_are_left_out_of_an_evaluation(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = packed(
        folder,
        ("a", ["a1", "!"]),
        ("cut", ["bad 1", "bad 2"]),
        ("b", "..."),
        ("none", "bad 3"),
        ("c", ["c1", "c2"]),
    )
    data = EvalPairs("val", records, EVAL).verify(threads=2)
    assert (data.text, data.txt2img, data.img2txt) == (["a1", "c1", "c2"], [0, 1, 1], [[0], [1, 2]])
    assert [(e.name, e.cause) for e in data.bad] == [
        ("val/0#1", "no_caption"),
        ("val/2", "no_caption"),
        ("val/1", "truncated_image"),
        ("val/3", "missing_image"),
    ]
    assert [data.image(i)["instance_id"] for i in range(2)] == ["val/0", "val/4"]
    assert "4 records are left out of the evaluation (2 no_caption, " in caplog.text


@pytest.mark.parametrize("records", [[("cut", "x")], [("a", "")], [("none", "x"), ("empty", "y")]], ids=str)
def test_an_evaluation_of_nothing_is_an_error(folder: Path, records: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError, match=r"nothing to evaluate on, all .* records are unusable"):
        EvalPairs("val", packed(folder, *records), EVAL).verify()


# Captioning


def test_every_picture_is_captioned_once_and_compared_with_what_people_wrote(folder: Path) -> None:
    records = packed(folder, ("a", ["A one.", " "]), ("b", "Three!"), ("a", "four"), ("c", None))
    data = EvalCaptions("val", records, EVAL)
    assert len(data) == 3
    assert [data.references(i) for i in range(3)] == [["A one.", "four"], ["Three!"], []]
    assert [data.instance_id(i) for i in range(3)] == ["val/0", "val/1", "val/3"]
    assert data.picture(1) == str(folder / "b.png")
    (batch,) = EvalLoader(data, 4).batches()
    assert sorted(batch) == ["image", "image_id", "image_norm", "index", "instance_id"]
    assert data.judge(0, "a red ball") is None


@pytest.mark.parametrize(
    ("records", "ids"),
    [
        ([{"image": "a.png", "image_id": 7}, {"image": "b.png", "image_id": "0012"}], [7, 12]),
        ([{"image": "val/COCO_val2014_000000000042.jpg"}, {"image": "x_3.png"}], [42, 3]),
        ([{"image": "1.png", "image_id": "coco_9"}, {"image": "2.png", "image_id": "coco_8"}], [1, 2]),
        ([{"image": "x/1.png"}, {"image": "y/1.png"}], [0, 1]),
        ([{"image": "x/1.png", "image_id": "p"}, {"image": "y/1.png", "image_id": "q"}], ["p", "q"]),
        ([{"image": "cat.png"}, {"image": "dog.png"}], ["cat", "dog"]),
    ],
    ids=str,
)
def test_image_ids_are_numbers_where_that_is_possible(
    folder: Path, records: list[dict[str, Any]], ids: list[Any]
) -> None:
    data = EvalCaptions("val", plain(folder, *records), EVAL)
    assert [data.image_id(i) for i in range(2)] == ids


def test_captions_of_an_official_file_take_the_place_of_the_records_own(folder: Path) -> None:
    official = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 6, "file_name": "b.png"}],
        "annotations": [{"image_id": 5, "caption": "One."}, {"image_id": 5, "caption": "Two."}],
    }
    (folder / "gt.json").write_text(json.dumps(official))
    records = plain(folder, {"image": "a.png", "image_id": 5}, {"image": "c.png", "image_id": 8})
    data = EvalCaptions("val", records, EVAL, read_official(folder / "gt.json", "image_id"))
    assert [data.references(i) for i in range(2)] == [["One.", "Two."], []]


def test_the_domain_of_a_picture_is_that_of_the_official_file_or_its_own(folder: Path) -> None:
    """NoCaps names it in its annotations of val only."""
    images = [
        {"id": i, "file_name": f"{i}.png", "domain": f"{d}-domain"} for i, d in ((5, "in"), (6, "near"))
    ]
    official = {"images": images, "annotations": [{"image_id": 5, "caption": "One."}]}
    (folder / "gt.json").write_text(json.dumps(official))
    own = {"domain": "out-domain"}
    records = plain(
        folder, *({"image": f"{i}.png", "image_id": i, **(own if i == 8 else {})} for i in (5, 6, 7, 8))
    )
    data = EvalCaptions("val", records, EVAL, read_official(folder / "gt.json", "image_id"))
    assert [data.domain(i) for i in range(4)] == ["in", "near", None, "out"]


def test_pictures_that_cannot_be_captioned_are_left_out(folder: Path) -> None:
    records = plain(folder, {"image": "a.png"}, {"image": "cut.png"}, {MALFORMED: "line 3"}, {"caption": "x"})
    data = EvalCaptions("val", records, EVAL).verify()
    assert (len(data), data.total, data.lost) == (1, 4, 3)
    causes = ["malformed_record", "truncated_image", "missing_image"]
    assert [error.cause for error in data.bad] == causes


def test_captions_of_scenes_are_judged_by_what_is_in_them(tmp_path: Path) -> None:
    make_scenes(tmp_path, size=16, train=0, val=0, test=5, web=0, workers=0)
    data: Any = build_dataset("scenes", section(), "test", tmp_path, train=False, wanted="caption")
    assert [data.image_id(i) for i in range(5)] == [0, 1, 2, 3, 4]
    for i in range(5):
        (own,) = data.references(i)
        score = data.judge(i, own)
        assert score["whole"] == 1
        assert score["right"] == score["stated"] > 2
        assert data.judge(i, "a thing") == {"right": 0, "stated": 1, "whole": 0}
    assert any(data.judge(0, data.references(i)[0])["whole"] == 0 for i in range(1, 5))
    own = section(path="scenes/annotations/test.json", images="scenes", split="test")
    other: Any = build_dataset("mine", own, "test", tmp_path, train=False, wanted="caption")
    assert other.judge(0, "a thing") is None


# Questions


QUESTIONS = [
    {"image": "a.png", "question": "What is IT?", "question_id": 11, "answer": ["cat", "cat", "dog"]},
    {
        "image": "a.png",
        "question": "Where?",
        "answers": [{"answer": "here"}],
        "type": "place",
        "choices": ["here", " ", "there"],
        "correct_choice": 2,
    },
    {"image": "b.png", "question": "How many (exactly)?", "question_id": "x", "answer": 3},
    {"image": "b.png", "question": "Unanswered?", "question_id": 14},
]


@pytest.mark.parametrize(
    ("told", "correct"),
    [(0, "a"), ("1", "b"), (True, None), (2, None), (-1, None), ("b", None), (None, None)],
)
def test_the_right_choice_is_told_by_its_number(folder: Path, told: Any, correct: str | None) -> None:
    record = {"image": "a.png", "question": "what?", "choices": ["a", "b"], "correct_choice": told}
    assert EvalQuestions("val", plain(folder, record), ASKED).correct_choice(0) == correct


def test_questions_have_ids_types_and_the_answers_as_annotated(folder: Path) -> None:
    data = EvalQuestions("val", plain(folder, *QUESTIONS), ASKED, candidates=lambda: ["yes", "no"])
    assert [data.question_id(i) for i in range(4)] == [11, 1, "x", 14]
    assert [data.answers(i) for i in range(4)] == [["cat", "cat", "dog"], ["here"], ["3"], []]
    assert [data.question_type(i) for i in range(4)] == ["", "place", "", ""]
    assert [data.choices(i) for i in range(4)] == [[], ["here", "there"], [], []]
    assert [data.correct_choice(i) for i in range(4)] == [None, "there", None, None]
    assert data.question(2) == "How many (exactly)?"
    assert data.answer_list == ["yes", "no"]
    (batch,) = EvalLoader(data, 4).batches()
    assert batch["text_input"] == ["what is it?", "where?", "how many exactly?", "unanswered?"]
    assert "answer" not in batch


def test_official_answers_are_found_by_question_id(folder: Path) -> None:
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(["a", "b"])]
    found = {"question_id": 14, "answers": answers, "question_type": "what", "answer_type": "other"}
    file = folder / "official.json"
    file.write_text(json.dumps({"info": {}, "data_type": "x", "annotations": [found]}))
    data = EvalQuestions("val", plain(folder, *QUESTIONS), ASKED, read_official(file, "question_id"))
    assert (data.answers(3), data.question_type(3), data.answer_type(3)) == (["a", "b"], "what", "other")
    assert data.answers(0) == []
    assert data.answer_list is None


def test_questions_are_left_out_with_their_picture(folder: Path) -> None:
    several = [{"image": "cut.png", "question": q} for q in ("one?", "two?")]
    records = plain(folder, *several, {"image": "a.png"}, {"image": "a.png", "question": "three?"})
    data = EvalQuestions("val", records, ASKED).verify()
    assert [data.question(i) for i in range(len(data))] == ["three?"]
    assert (data.total, data.lost) == (4, 3)
    assert [(e.name, e.cause) for e in data.bad] == [("val/2", "no_question"), ("val/0", "truncated_image")]


# Sentences


def test_sentences_have_classes_and_their_pictures(folder: Path) -> None:
    records = plain(
        folder,
        {"images": ["a.png", "b.png"], "sentence": "The LEFT one.", "label": "True", "type": "left"},
        {"images": ["c.png", "d.png"], "sentence": "Two dogs", "label": False},
        {"images": ["c.png", "cut.png"], "sentence": "Two cats", "label": False},
        {"images": ["c.png"], "sentence": "One", "label": True},
    )
    maker = PairMaker(BlipImageEval(image_size=8), BlipCaption())
    data = EvalLabels("dev", records, maker).verify()
    assert (len(data), data.classes, data.total) == (2, ["False", "True"], 4)
    assert [data.label(i) for i in range(2)] == [1, 0]
    assert [data.text(i) for i in range(2)] == ["the left one", "two dogs"]
    assert (data.sentence_type(0), data.sentence_type(1)) == ("left", "")
    assert data.pictures(1) == [str(folder / "c.png"), str(folder / "d.png")]
    assert data.picture(1) == str(folder / "c.png")
    assert {e.name: e.cause for e in data.bad} == {"dev/2": "truncated_image", "dev/3": "missing_image"}
    (batch,) = EvalLoader(data, 4).batches()
    assert batch["text_input"] == ["the left one", "two dogs"]  # nothing changes places
    assert batch["label"].tolist() == [1, 0]
    expected = BlipImageEval(image_size=8).pixels(Image.open(folder / "d.png"))
    assert torch.equal(batch["image1"][1], expected)


def test_a_label_that_is_no_class_is_left_out(folder: Path) -> None:
    records = plain(
        folder,
        {"image": "a.png", "sentence": "x", "label": "neutral"},
        {"image": "a.png", "sentence": "y", "label": "-"},
        {"image": "a.png", "sentence": "z"},
    )
    maker = LabelMaker(BlipImageEval(image_size=8), BlipCaption(), classes=["no", "neutral"])
    data = EvalLabels("dev", records, maker)
    assert [data.label(i) for i in range(len(data))] == [1]
    assert [error.cause for error in data.bad] == ["bad_label", "no_label"]
