"""Answers' accuracy against the official VQA evaluation: its values, and its rules as plain loops.

goldens/vqa_accuracy.json holds answers with what the official code (as LAVIS ships it) made of them.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from blip.metrics.vqa import clean_answer, vqa_accuracy

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "vqa_accuracy.json").read_text(encoding="utf-8"))
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = [
    *(
        "yes",
        "No",
        "2",
        "two",
        "Ten",
        "none",
        "a",
        "an",
        "The",
        "dog",
        "T-shirt",
        "1,000",
        "3.5",
        "3.",
        "U.S.",
    ),
    *(
        "black/white",
        "red,",
        ",red",
        "12:30",
        "(left)",
        "right?",
        "$5",
        "a&b",
        "x_y",
        '"quoted"',
        "don't",
        "@",
    ),
]


def plain_punctuation(text: str) -> str:
    found = text
    for sign in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        near_blank = sign + " " in text or " " + sign in text
        found = found.replace(sign, "" if near_blank or re.search(r"\d,\d", text) else " ")
    return re.sub(r"\.(?!\d)", "", found)


def plain_answer(text: str) -> str:
    words = plain_punctuation(text.strip()).lower().split()
    words = ["0" if w == "none" else str(NUMBERS.index(w)) if w in NUMBERS else w for w in words]
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def plain_accuracy(answer: str, truths: list[str]) -> float:
    if any(truth != truths[0] for truth in truths):
        truths = [plain_punctuation(truth) for truth in truths]
    scores = []
    for left_out in range(len(truths)):
        others = [truth for i, truth in enumerate(truths) if i != left_out]
        scores.append(min(1, others.count(plain_answer(answer)) / 3))
    return sum(scores) / len(scores)


def some_text(rng: random.Random) -> str:
    return rng.choice([" ", " ", "-", ". "]).join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))


@pytest.mark.parametrize("row", GOLDENS, ids=range(len(GOLDENS)))
def test_values_are_those_of_the_official_code(row: dict) -> None:
    assert clean_answer(row["answer"]) == row["cleaned"]
    assert vqa_accuracy(row["answer"], row["truths"]) == pytest.approx(row["accuracy"], abs=1e-9)


def test_accuracy_is_that_of_plain_loops() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        answer = some_text(rng)
        pool = [answer, plain_answer(answer), answer.lower(), some_text(rng)]
        truths = [rng.choice(pool[: rng.randint(1, 4)]) for _ in range(rng.choice([2, 5, 10, 10]))]
        expected = plain_accuracy(answer, truths)
        assert vqa_accuracy(answer, truths) == pytest.approx(expected, abs=1e-12), (answer, truths)
