"""Facts about what counts as right on each dataset: from the catalogue or the section to what tasks see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from PIL import Image

from blip.config.schema import DatasetConfig
from blip.data.catalog.scoring import SCORING, scoring
from blip.data.catalog.table import CATALOG
from blip.data.sources import build_dataset
from blip.data.truth import read_relevance
from blip.errors import DataError
from blip.metrics.vqa import MEASURES
from blip.tasks.submissions import SERVERS
from tests.unit.data.test_sources import section

KNOWN = set(get_args(get_type_hints(DatasetConfig)["measure"]))


def test_what_is_declared_exists() -> None:
    assert set(SCORING) <= set(CATALOG)
    assert {one.measure for one in SCORING.values()} <= KNOWN
    assert {"auto", *MEASURES} <= KNOWN
    assert {one.server for one in SCORING.values()} - {""} <= set(SERVERS)


def test_every_set_of_questions_with_answers_says_how_it_is_scored() -> None:
    asked = {name for name, row in CATALOG.items() if row.kind == "vqa" and not row.embedded}
    assert {name for name in asked if not scoring(name).measure} == {"coco_vqg", "ok_vqg", "aok_vqg"}


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("ivqa", "pairs"),
        ("gqa_instruct", "exact"),
        ("msvd_qa", "exact"),
        ("aok_vqa", "direct"),
        ("hateful_memes", "auc"),
        ("scienceqa_instruct", "choice"),
        ("visdial", "ranks"),
        ("coco_caption", ""),
    ],
)
def test_a_named_dataset_has_its_benchmarks_measure(name: str, measure: str) -> None:
    assert scoring(name).measure == measure


def questions(folder: Path, **more: Any) -> Any:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    rows = [{"image": "a.png", "question": "what?", "answer": ["x", "y"], "question_id": 1}]
    (folder / "list.json").write_text(json.dumps(rows))
    config = section(path={"val": str(folder / "list.json")}, **more)
    return config


@pytest.mark.parametrize("wanted", ["vqa", "instruct"])
@pytest.mark.parametrize(
    ("name", "given", "measure"),
    [("mine", "auto", ""), ("mine", "exact", "exact"), ("ivqa", "auto", "pairs")],
)
def test_tasks_see_the_measure(tmp_path: Path, name: str, given: str, measure: str, wanted: str) -> None:
    data: Any = build_dataset(name, questions(tmp_path, measure=given), "val", train=False, wanted=wanted)
    assert data.measure == measure
    assert data.server == ""


def visdial(root: Path) -> None:
    """One dialog of two turns with three candidates each, in VisDial's own files."""
    picture = root / "visdial/images/VisualDialog_val2018/VisualDialog_val2018_000000000017.jpg"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    turns = [
        {"question": 0, "answer": 1, "answer_options": [0, 1, 2], "gt_index": 1},
        {"question": 1, "answer": 2, "answer_options": [2, 0, 1], "gt_index": 0},
    ]
    dialogs = [{"image_id": 17, "caption": "a dog", "dialog": turns}]
    content = {"questions": ["is it", "what"], "answers": ["no", "yes", "dog"], "dialogs": dialogs}
    (root / "visdial/annotations").mkdir()
    path = root / "visdial/annotations/visdial_1.0_val.json"
    path.write_text(json.dumps({"split": "val2018", "data": content}))


def test_dense_annotations_of_visdial_are_those_of_their_turn(tmp_path: Path) -> None:
    visdial(tmp_path)

    def relevances() -> list[list[float] | None]:
        data: Any = build_dataset("visdial", section(), "val", tmp_path, train=False, wanted="instruct")
        assert data.server == "visdial"
        assert [data.choices(index) for index in range(2)] == [["no", "yes", "dog"], ["dog", "no", "yes"]]
        return [data.relevance(index) for index in range(2)]

    assert relevances() == [None, None]
    dense = tmp_path / "visdial/annotations/visdial_1.0_val_dense_annotations.json"
    dense.write_text(json.dumps([{"image_id": 17, "round_id": 2, "gt_relevance": [1.0, 0.0, 0.4]}]))
    assert relevances() == [None, [1.0, 0.0, 0.4]]


def test_a_file_that_is_no_dense_annotation_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dense.json"
    path.write_text(json.dumps([{"image_id": 17}]))
    with pytest.raises(
        DataError, match=r"dense\.json: not a JSON list of image_id, round_id and gt_relevance"
    ):
        read_relevance(path)
