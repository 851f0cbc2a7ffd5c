"""Accuracy of answers by the rules of the official VQA evaluation, and of sets that have their own.

The rules are kept with their oddities, since published numbers were made with them: reference answers are
cleaned only where they differ, and never of articles or number words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation in the order in which it is taken away."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official code passes a flag in the place of the count of replacements."""

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = frozenset(["a", "an", "the"])

# What is written with apostrophes; the official table has these and no others.
_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd
he's how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd
something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't
what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's
won't would've wouldn't y'all you'd you'll you're you've"""
_TWO_APOSTROPHES = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've"""


def _contractions() -> dict[str, str]:
    """What is written instead of each contraction -> the contraction."""
    table = {right.replace("'", ""): right for right in _ONE_APOSTROPHE.split()}
    for right in _TWO_APOSTROPHES.split():  # one of the two apostrophes is missing
        first, second, last = right.split("'")
        table |= {f"{first}{second}'{last}": right, f"{first}'{second}{last}": right}
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return table | {"you'dve": "you'd've", "youd've": "you'd've", "somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


@lru_cache(maxsize=1 << 16)
def clean_punctuation(text: str) -> str:
    """The punctuation step: a sign next to a blank is deleted, any other becomes a blank.

    All signs are deleted where a comma stands between digits. Periods go unless a digit follows.
    """
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for sign in _SIGNS:
        if sign in text:
            alone = in_number or f"{sign} " in text or f" {sign}" in text
            cleaned = cleaned.replace(sign, "" if alone else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


@lru_cache(maxsize=1 << 16)
def clean_words(text: str) -> str:
    """The word step: lower case, number words as digits, no articles, apostrophes put back, single blanks."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def clean_answer(text: str) -> str:
    """A predicted answer as the official evaluation compares it."""
    return clean_words(clean_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """How right an answer is, 0 to 1: min(1, n / 3) for n other people's same answer, averaged over people.

    Reference answers lose their punctuation only if they are not all the same. A single reference answer has
    no other people to compare with (it would always give 0): then the answer is right if it equals it, as in
    `exact_match`.

    Args:
        answer: predicted.
        truths: of the people asked, ten in VQAv2; at least one.
    """
    if len(truths) == 1:
        return exact_match(answer, truths[0])
    predicted = clean_answer(answer)
    if len(set(truths)) > 1:
        truths = [clean_punctuation(truth) for truth in truths]
    same, count = sum(truth == predicted for truth in truths), len(truths)
    return (same * min(1.0, (same - 1) / 3) + (count - same) * min(1.0, same / 3)) / count


def exact_match(answer: str, truth: str) -> float:
    """1.0 if both are the same after all cleaning (GQA), else 0.0."""
    return float(clean_answer(answer) == clean_words(clean_punctuation(truth)))


def direct_accuracy(answer: str, truths: Sequence[str]) -> float:
    """A-OKVQA's measure of direct answers, 0 to 1: min(1, n / 3) for n equal reference answers."""
    return min(1.0, sum(truth == answer for truth in truths) / 3)


def pair_accuracy(answer: str, truths: Sequence[str]) -> float:
    """iVQA's measure, 0 to 1: min(1, n / 2) for n equal reference answers, after all cleaning of both."""
    return min(1.0, sum(exact_match(answer, truth) for truth in truths) / 2)


def any_match(answer: str, truths: Sequence[str]) -> float:
    """1.0 if the answer equals one of the reference answers after all cleaning of both, else 0.0."""
    return max(exact_match(answer, truth) for truth in truths)


MEASURES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa": vqa_accuracy,
    "exact": any_match,
    "direct": direct_accuracy,
    "pairs": pair_accuracy,
}
"""Accuracies of an answer by the name of the measure; others take a single right answer, as `exact` does."""


def answer_accuracy(answer: str, truths: Sequence[str], measure: str = "") -> float:
    """How right an answer is by a measure, 0 to 1; one reference answer has to be equalled by any of them.

    Args:
        answer: predicted.
        truths: of the people asked; at least one.
        measure: as `datasets.NAME.measure`; empty: `vqa`.
    """
    if len(truths) == 1:
        return exact_match(answer, truths[0])
    return MEASURES.get(measure or "vqa", any_match)(answer, truths)


@dataclass
class AnswerScores:
    """Accuracies of many answers, of all together and of each type of question and answer."""

    rows: list[tuple[float, str | None, str | None]] = field(default_factory=list)
    """Accuracy, type of the question, type of the answer."""

    def add(self, accuracy: float, question_type: str | None = None, answer_type: str | None = None) -> None:
        """Count one answer."""
        self.rows.append((accuracy, question_type, answer_type))

    def means(
        self, overall: str = "overall", answers: str = "answer_type", questions: str = "question_type"
    ) -> dict[str, float]:
        """Mean accuracies in percent: `overall`, `answer_type_yes_no`, ..., `question_type_what_color`, ...

        Sums are exact, so the order of the rows does not matter. Nothing is rounded; the official evaluation
        reports two digits. Nothing where there are no rows.
        """
        groups: dict[str, list[float]] = {}
        if self.rows:
            groups[overall] = [row[0] for row in self.rows]
        for kind, place in ((answers, 2), (questions, 1)):
            typed = sorted(((str(row[place]), row[0]) for row in self.rows if row[place]), key=lambda r: r[0])
            for name, accuracy in typed:
                groups.setdefault(f"{kind}_{_word(name)}", []).append(accuracy)
        return {name: _percent(values) for name, values in groups.items()}


def _percent(values: Iterable[float]) -> float:
    values = list(values)
    return 100 * math.fsum(values) / len(values)


def _word(name: str) -> str:
    """The name of a type as part of a metric's: `yes/no` -> `yes_no`."""
    return re.sub(r"\W+", "_", name.lower()).strip("_") or "other"
