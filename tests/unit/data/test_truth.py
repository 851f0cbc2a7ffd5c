"""Lists of answers and classes, and official annotation files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip.data.records import ById, PackedRecords
from blip.data.truth import all_answers, all_labels, read_answer_list, read_official
from blip.errors import DataError


@pytest.mark.parametrize(
    ("content", "answers"), [(["b", "a", "b"], ["b", "a"]), ({"yes": 0, "no": 1}, ["yes", "no"])], ids=str
)
def test_an_answer_list_is_a_list_or_an_object(tmp_path: Path, content: Any, answers: list[str]) -> None:
    (tmp_path / "answers.json").write_text(json.dumps(content))
    assert read_answer_list(tmp_path / "answers.json") == answers


@pytest.mark.parametrize("content", ["[1, 2]", "[]", '"yes"', "[", ""], ids=repr)
def test_what_is_no_answer_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(DataError, match=r"answers\.json: .*JSON list"):
        read_answer_list(tmp_path / "answers.json")


def test_all_answers_and_labels_are_the_different_ones_sorted() -> None:
    records: list[dict[str, Any]] = [{"answer": ["b", "a", " "]}, {"answers": "b"}, {"answer": [{}]}, {}]
    assert all_answers(records) == ["a", "b"]
    assert all_labels([{"label": "b"}, {"label": " a"}, {"label": ""}, {}, {"label": "b"}]) == ["a", "b"]
    assert all_labels([{"label": 10}, {"label": 9}]) == ["9", "10"]
    assert all_labels([{"label": True}, {"label": False}]) == ["False", "True"]


def test_records_are_found_by_their_id() -> None:
    table = ById(PackedRecords([{"id": i, "n": n} for n, i in enumerate([7, "x", 3, 7])]), "id")
    assert [table.get(i) for i in (7, "7", "x", 3)] == [
        {"id": 7, "n": 0},
        {"id": 7, "n": 0},
        {"id": "x", "n": 1},
        {"id": 3, "n": 2},
    ]
    assert table.get(4) is None
    assert ById(PackedRecords([]), "id").get(1) is None


def test_an_official_file_without_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["yes", "no"]')
    with pytest.raises(DataError, match=r"list\.json: no record has 'question_id'; give an official"):
        read_official(tmp_path / "list.json", "question_id")
