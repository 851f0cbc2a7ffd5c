"""What evaluation servers take: predictions about what is secret, in the form of each benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blip.tasks.base import Prediction


def vqa(data: Any, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """VQAv2's, OK-VQA's and TextVQA's `[{question_id, answer}]`."""
    return [
        {"question_id": _number(data.question_id(p["index"])), "answer": p["answer"]} for p in predictions
    ]


def vizwiz(data: Any, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """VizWiz's `[{image, answer}]`; an image is the name of its file."""
    return [{"image": Path(str(p["image"])).name, "answer": p["answer"]} for p in predictions]


def gqa(data: Any, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """GQA's `[{questionId, prediction}]`."""
    return [{"questionId": str(data.question_id(p["index"])), "prediction": p["answer"]} for p in predictions]


def aok_vqa(data: Any, predictions: Sequence[Prediction]) -> dict[str, dict[str, str]]:
    """The leaderboard's `{question_id: {multiple_choice, direct_answer}}`; what was not asked is empty."""
    told = {}
    for p in predictions:
        chosen = p["answer"] if p.get("ranked") else p.get("choice", "")
        direct = "" if p.get("ranked") else p["answer"]
        told[str(data.question_id(p["index"]))] = {"multiple_choice": chosen, "direct_answer": direct}
    return told


def visdial(data: Any, predictions: Sequence[Prediction]) -> list[dict[str, Any]] | None:
    """VisDial's `[{image_id, round_id, ranks}]`: rounds and places count from 1; None without places."""
    told = []
    for p in predictions:
        if "ranks" not in p:
            return None
        image, _, turn = str(data.question_id(p["index"])).partition("#")
        told.append({"image_id": _number(image), "round_id": int(turn or 0) + 1, "ranks": p["ranks"]})
    return told


def captions(data: Any, predictions: Sequence[Prediction], key: str = "caption") -> list[dict[str, Any]]:
    """COCO's and NoCaps's `[{image_id, caption}]`."""
    return [{"image_id": data.image_id(p["index"]), "caption": p[key]} for p in predictions]


SERVERS: dict[str, Callable[[Any, Sequence[Prediction]], Any]] = {
    "vqa": vqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "aok_vqa": aok_vqa,
    "visdial": visdial,
}
"""Formats of questions by name, as the catalogue has them."""


def _number(question_id: int | str) -> int | str:
    """The number that a text writes out: servers take numbers only."""
    return int(question_id) if isinstance(question_id, str) and question_id.isdecimal() else question_id
