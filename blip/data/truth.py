"""What evaluations compare with beside the records: official files, lists of answers and classes, scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from blip.data.kinds import answers_of, sort_labels
from blip.data.readers import Record, read_file
from blip.data.records import ById, PackedRecords
from blip.data.samples import MALFORMED, BadRecord
from blip.data.scenes.make import Scene, image_path, score_caption
from blip.errors import DataError

Judge = Callable[[str, str], dict[str, int] | None]
"""(path of a picture as annotated, caption) -> how much of the caption is right; None: nobody knows."""


def read_official(path: Path, column: str) -> ById:
    """The records of an official annotation file by `column`: VQA's by question_id, COCO's by image_id.

    Raises:
        DataError: it cannot be used.
    """
    packed = PackedRecords(read_file(path, "json"), files=[str(path)])
    if not any(column in record for record in packed):
        raise DataError(
            f"{path}: no record has {column!r}; give an official annotation file, with a list 'annotations'"
        )
    return ById(packed, column)


def read_relevance(path: Path) -> dict[str, list[float]]:
    """VisDial's dense annotations: `question_id` of a turn -> relevance of each of its candidates, 0 to 1.

    Raises:
        DataError: it holds something else.
    """
    try:
        found = {
            f"{int(row['image_id'])}#{int(row['round_id']) - 1}": [float(one) for one in row["gt_relevance"]]
            for row in json.loads(path.read_text(encoding="utf-8"))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a JSON list of image_id, round_id and gt_relevance"
            f" ({type(error).__name__}: {error}); give VisDial's dense annotations, or remove the file"
        ) from error
    return found


def read_answer_list(path: Path) -> list[str]:
    """The answers of a JSON list; of an object, its keys.

    Raises:
        DataError: it holds neither, or anything but texts.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a JSON list of answers ({error})") from error
    answers = list(content) if isinstance(content, list | dict) else []
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{path}: not a JSON list of texts; give the list of answers that are ranked")
    return list(dict.fromkeys(answers))


def all_answers(records: Iterable[Record]) -> list[str]:
    """The different answers of records, sorted; those that are no texts are left out."""
    found: set[str] = set()
    for record in records:
        try:
            found.update(answer for answer in answers_of(record) if answer.strip())
        except BadRecord:
            continue
    return sorted(found)


def all_labels(records: Iterable[Record]) -> list[str]:
    """The different labels of records, in the order of their numbers."""
    labels = {str(record.get("label")).strip() for record in records if record.get("label") not in (None, "")}
    return sort_labels(labels)


class SceneJudge:
    """Judges captions of the embedded scenes by what is in each picture.

    Args:
        records: of `records_<split>.json`, scene after scene.
    """

    def __init__(self, records: PackedRecords) -> None:
        self._records = records

    def __call__(self, image: str, caption: str) -> dict[str, int] | None:
        """How many of the attributes and relations that a caption states are right, see `score_caption`.

        Returns:
            `right`, `stated`, and `whole`: 1 where nothing is wrong or missing; None for another picture.
        """
        number = Path(image).stem
        if not number.isdecimal() or int(number) >= len(self._records):
            return None
        record: Mapping[str, Any] = self._records[int(number)]
        if MALFORMED in record:
            return None
        scene = Scene.from_record(dict(record))
        if image_path(scene) != image:
            return None
        score = score_caption(caption, scene)
        return {"right": score.right, "stated": score.stated, "whole": int(score.whole)}
