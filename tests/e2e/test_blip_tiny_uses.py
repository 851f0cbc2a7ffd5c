"""What BLIP is used for beside its training tasks, at tiny size: matching, features, statements, clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import Commands, lines, train_lines
from tests.e2e.test_blip_recipes import MED, RECALLS, SMALL, options

TEXT = f"model.med={{{MED}}}"
QUEUE = "model.queue_size=32"


def trained(commands: Commands, name: str, data: str, root: Path, folder: Path, *more: str) -> Path:
    """A run of two steps of a tiny recipe that starts from nothing."""
    ended = commands("--cfg", f"tiny/{name}.yaml", *options(data, root, folder), TEXT, *more)
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def retrieval(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval") / "run"
    return trained(commands, "blip_retrieval", "scenes", data_root, folder, QUEUE)


@pytest.fixture(scope="module")
def vqa(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(commands, "blip_vqa", "scenes_vqa", data_root, tmp_path_factory.mktemp("vqa") / "run")


def scored(
    commands: Commands, name: str, start: Path, data: str, root: Path, folder: Path, *more: str
) -> Any:
    """The scores that an evaluation recipe gives a run, and its predictions by number."""
    small = [
        *SMALL[:2],
        TEXT,
        f"datasets.{data}.vis_processor.eval.image_size=32",
        f"model.init_from={start}",
    ]
    places = [f"run.data_root={root}", f"run.output_dir={folder}"]
    ended = commands("--cfg", f"tiny/{name}.yaml", *small, *places, *more, module="blip.evaluate")
    assert ended.code == 0, ended.output
    [line] = lines(folder)
    return line, predictions(folder)


def predictions(folder: Path) -> dict[int, dict[str, Any]]:
    [file] = (folder / "predictions").glob("test-*.json")
    return {found["index"]: found for found in json.loads(file.read_text())}


def recalls(line: dict[str, Any], before: str = "") -> dict[str, float]:
    return {name: line[before + name] for name in RECALLS}


def test_matching_scores_as_the_retrieval_that_it_is_left_of(
    commands: Commands, retrieval: Path, data_root: Path, tmp_path: Path
) -> None:
    line, found = scored(commands, "blip_matching_eval", retrieval, "scenes", data_root, tmp_path / "run")
    before = lines(retrieval)[-1]
    assert recalls(line) == recalls(before)
    assert recalls(line, "itc_") == recalls(before, "itc_")
    assert found == predictions(retrieval)


def test_features_alone_score_as_similarity_does(
    commands: Commands, retrieval: Path, data_root: Path, tmp_path: Path
) -> None:
    line, found = scored(commands, "blip_features_eval", retrieval, "scenes", data_root, tmp_path / "run")
    assert recalls(line) == recalls(lines(retrieval)[-1], "itc_")
    assert "itc_txt_r1" not in line
    assert all(-1 <= score <= 1 for row in found.values() for score in row["score"])


def test_what_has_no_matching_head_cannot_re_rank(
    commands: Commands, retrieval: Path, data_root: Path, tmp_path: Path
) -> None:
    small = [
        *SMALL[:2],
        TEXT,
        "datasets.scenes.vis_processor.eval.image_size=32",
        f"run.data_root={data_root}",
    ]
    start = [f"model.init_from={retrieval}", f"run.output_dir={tmp_path / 'run'}", "run.k_test=16"]
    refused = commands("--cfg", "tiny/blip_features_eval.yaml", *small, *start, module="blip.evaluate")
    assert (
        "run.k_test: 16, but 'blip_feature_extractor' has no matching head to re-rank with"
        in refused.refusal()
    )


def test_a_still_is_found_as_its_picture_is(
    commands: Commands, retrieval: Path, data_root: Path, tmp_path: Path
) -> None:
    """The mean of equal frames' features is theirs, and tokens that stand there four times weigh as once."""
    name, folder = "blip_video_retrieval_eval", tmp_path / "run"
    line, found = scored(commands, name, retrieval, "stills", data_root, folder, QUEUE)
    assert line.keys() >= RECALLS | {"txt_mdR", "img_mdR"}
    before = predictions(retrieval)
    assert found.keys() == before.keys()
    for index, row in found.items():
        assert row["score"] == pytest.approx(before[index]["score"], abs=2e-4)
        assert row["truth"] == before[index]["truth"]


def test_a_still_is_asked_about_as_its_picture_is(
    commands: Commands, vqa: Path, data_root: Path, tmp_path: Path
) -> None:
    line, found = scored(commands, "blip_video_qa_eval", vqa, "stills", data_root, tmp_path / "stills")
    pictures = [*SMALL[:2], TEXT, "datasets.scenes_vqa.vis_processor.eval.image_size=32"]
    places = [
        f"run.data_root={data_root}",
        f"run.output_dir={tmp_path / 'pictures'}",
        f"model.init_from={vqa}",
    ]
    ended = commands(
        *("--cfg", "tiny/blip_vqa.yaml", *pictures, *places, "run.task=gqa"), module="blip.evaluate"
    )
    assert ended.code == 0, ended.output
    before = predictions(tmp_path / "pictures")
    assert found.keys() == before.keys()
    other = [index for index, row in found.items() if row["answer"] != before[index]["answer"]]
    assert len(other) <= 1  # where two answers are equally likely
    assert line["acc"] == pytest.approx(lines(tmp_path / "pictures")[-1]["acc"], abs=100 / len(found))


def test_statements_are_told_true_or_false(
    commands: Commands, vqa: Path, data_root: Path, tmp_path: Path
) -> None:
    folder, sizes = (
        tmp_path / "run",
        [f"datasets.{data}.vis_processor" for data in ("statements", "questions")],
    )
    small = [f"{size}.{stage}.image_size=32" for size in sizes for stage in ("train", "eval")]
    places = [f"run.data_root={data_root}", f"run.output_dir={folder}", f"model.init_from={vqa}"]
    ended = commands("--cfg", "tiny/blip_classification.yaml", *SMALL, TEXT, *small, *places)
    assert ended.code == 0, ended.output
    assert [line["step"] for line in train_lines(folder)] == [1, 2]
    found, line = predictions(folder), lines(folder)[-1]
    assert {row["truth"] for row in found.values()} == {"no", "yes"}
    assert (
        line["acc"]
        == line["type_verify"]
        == pytest.approx(100 * sum(row["right"] for row in found.values()) / len(found))
    )
    told = json.loads((data_root / "scenes/annotations/instruct_test.json").read_text())
    assert len(found) == sum(record["type"] == "verify" for record in told)
    again = tmp_path / "again"
    places = [f"run.data_root={data_root}", f"run.output_dir={again}", f"model.init_from={folder}"]
    ended = commands(
        *("--cfg", "tiny/blip_classification.yaml", *SMALL, TEXT, *small, *places), module="blip.evaluate"
    )
    assert ended.code == 0, ended.output
    assert predictions(again) == found
