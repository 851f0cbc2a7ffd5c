"""Answers' accuracy against the official VQA evaluation: its values, and its rules as plain loops.

goldens/vqa_accuracy.json holds answers with what the official code (as LAVIS ships it) made of them, and
goldens/vqa_words.json single words: all of its contractions, number words and articles. The loops below are
written from its rules, character by character, and share nothing with the library.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip.metrics.vqa import AnswerScores, clean_answer, clean_punctuation, vqa_accuracy

FOLDER = Path(__file__).parent / "goldens"
GOLDENS = json.loads((FOLDER / "vqa_accuracy.json").read_text(encoding="utf-8"))
WORDS: dict[str, str] = json.loads((FOLDER / "vqa_words.json").read_text(encoding="utf-8"))
SIGNS = [
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
]
OFTEN = (
    "yes No 2 dog cat T-shirt 1,000 3.5 3. .5 U.S. black/white red, ,red 12:30 (left) right? $5 a&b x_y @ 50%"
)
ANY = "abcT019 .,;:/[]\"{}()=+\\_-><@`?!'*#%&\n\t \xe9\xbd\u0663\u4e00"
KINDS = [("what is", "other"), ("how many", "number"), ("is the", "yes/no"), ("none of the above", "other")]


def plain_punctuation(text: str) -> str:
    """Signs next to a blank go, others leave one; then the first 32 periods that no digit follows go."""
    number = any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:]))  # noqa: B905
    kept = ""
    for char in text:
        if char not in SIGNS:
            kept += char
        elif not number and char + " " not in text and " " + char not in text:
            kept += " "
    found, removed = "", 0
    for i, char in enumerate(kept):
        if char == "." and removed < 32 and not kept[i + 1 : i + 2].isdecimal():
            removed += 1  # a digit in front does not save it: the official look-behind is mistyped
        else:
            found += char
    return found


def plain_answer(text: str) -> str:
    cleaned = plain_punctuation(" ".join(" ".join(text.split("\n")).split("\t")).strip())
    words = [WORDS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(word for word in words if word)


def plain_accuracy(answer: str, truths: list[str]) -> float:
    if any(truth != truths[0] for truth in truths):
        truths = [plain_punctuation(truth) for truth in truths]
    scores = []
    for left_out in range(len(truths)):
        others = [truth for i, truth in enumerate(truths) if i != left_out]
        scores.append(min(1, others.count(plain_answer(answer)) / 3))
    return sum(scores) / len(scores)


def some_text(rng: random.Random) -> str:
    """Words, or any signs; now and then with more periods than are taken away."""
    if rng.random() < 0.4:
        found = "".join(rng.choice(ANY) for _ in range(rng.randint(0, 14)))
    else:
        known = rng.choice([list(WORDS), OFTEN.split()])
        words = [
            rng.choice([str, str, str.upper, str.title])(rng.choice(known)) for _ in range(rng.randint(1, 4))
        ]
        found = rng.choice([" ", " ", "  ", "-", ", ", ". ", "/"]).join(words)
    return found + "." * rng.randint(20, 60) + rng.choice(["", "1"]) if rng.random() < 0.02 else found


def cases(seed: int, count: int) -> Iterator[tuple[str, list[str]]]:
    """Answers and what people said: the same, cleaned, other ones, in any number, ties among them."""
    rng = random.Random(seed)
    for _ in range(count):
        answer = some_text(rng)
        pool = [answer, plain_answer(answer), plain_punctuation(answer), answer.lower(), some_text(rng)]
        people = rng.choice([2, 3, 5, 10, 10, 10])
        yield answer, [rng.choice(pool[: rng.randint(1, 5)]) for _ in range(people)]


@pytest.mark.parametrize("row", GOLDENS, ids=range(len(GOLDENS)))
def test_values_are_those_of_the_official_code(row: dict) -> None:
    assert clean_answer(row["answer"]) == row["cleaned"]
    assert vqa_accuracy(row["answer"], row["truths"]) == pytest.approx(row["accuracy"], abs=1e-9)


def test_words_are_those_of_the_official_code() -> None:
    assert len(WORDS) > 200
    assert {word: clean_answer(word) for word in WORDS} == WORDS


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_that_of_plain_loops(seed: int) -> None:
    """12,000 answers."""
    found = list(cases(seed, 3000))
    wrong = [
        (answer, truths)
        for answer, truths in found
        if clean_answer(answer) != plain_answer(answer)
        or abs(vqa_accuracy(answer, truths) - plain_accuracy(answer, truths)) > 1e-12
    ]
    assert wrong == []
    scores = [vqa_accuracy(answer, truths) for answer, truths in found]
    assert len({round(score, 3) for score in scores}) > 10  # neither all right nor all wrong


def test_at_most_32_periods_go() -> None:
    assert clean_punctuation("." * 40) == "." * 8
    assert clean_punctuation("a." * 40) == "a" * 32 + "a." * 8


def test_means_are_the_official_ones_before_rounding() -> None:
    """The official code rounds to two digits what it reports; we do not, so that close models differ."""
    rng = random.Random(5)
    rows = [(vqa_accuracy(*case), *rng.choice(KINDS)) for case in cases(9, 2000)]
    scores = AnswerScores()
    expected: dict[str, list[float]] = {}
    for accuracy, question, answer in rows:
        scores.add(accuracy, question, answer)
        kinds = (
            "overall",
            "question_type_" + "_".join(question.split()),
            "answer_type_" + answer.replace("/", "_"),
        )
        for kind in kinds:
            expected.setdefault(kind, []).append(accuracy)
    official = {kind: round(100 * sum(some) / len(some), 2) for kind, some in expected.items()}
    assert scores.means() == pytest.approx(official, rel=0, abs=0.005 + 1e-9)
