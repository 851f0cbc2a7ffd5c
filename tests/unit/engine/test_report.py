"""The page of a run folder: which predictions it shows, and which of them as failures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip.engine.report import MAX_SAMPLES, write_report


def page(folder: Path, predictions: list[dict[str, Any]]) -> str:
    (folder / "predictions").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"split": "test", "step": 3, "acc": 50.0}) + "\n")
    (folder / "predictions" / "test-scenes-step-00000003.json").write_text(json.dumps(predictions))
    return write_report(folder).read_text()


def failures(text: str) -> str:
    return text.partition("<h2>Failures</h2>")[2].partition("</section>")[0]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"answer": "red", "truth": ["blue"], "right": False}, {"answer": "two", "right": True}),
        ({"found": ["a dog", "a cat"], "truth": ["a cat"]}, {"found": ["a cat"], "truth": ["a cat"]}),
    ],
)
def test_what_went_wrong_stands_in_a_section_of_its_own(
    tmp_path: Path, wrong: dict[str, Any], right: dict[str, Any]
) -> None:
    text = page(tmp_path / "run", [{**wrong, "instance_id": "one"}, {**right, "instance_id": "other"}])
    assert "test-scenes: 1 of 2" in failures(text)
    assert "<footer>one</footer>" in failures(text)
    assert "<footer>other</footer>" not in failures(text)
    assert "<footer>other</footer>" in text


def test_without_a_failure_there_is_no_such_section(tmp_path: Path) -> None:
    assert "Failures" not in page(tmp_path / "run", [{"caption": "a dog", "instance_id": "one"}])


def test_two_pictures_of_a_prediction_are_both_shown(tmp_path: Path) -> None:
    names = []
    for number in range(2):
        names.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(names[-1])
    text = page(tmp_path / "run", [{"images": names, "text": "both are dark", "right": True}])
    assert len(set(re.findall(r'<img src="(data:[^"]+)"', text))) == 2


def test_as_many_failures_as_samples_are_shown(tmp_path: Path) -> None:
    wrong = [{"answer": "red", "right": False, "instance_id": f"n{i}"} for i in range(3 * MAX_SAMPLES)]
    shown = re.findall(r"<footer>n(\d+)</footer>", failures(page(tmp_path / "run", wrong)))
    assert len(shown) == MAX_SAMPLES
    assert int(shown[-1]) > 2 * MAX_SAMPLES
