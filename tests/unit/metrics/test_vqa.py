"""Facts about answers' accuracy; tests/parity compares with the official evaluation's values."""

from __future__ import annotations

import pytest

from blip.metrics.vqa import (
    AnswerScores,
    answer_accuracy,
    clean_answer,
    clean_punctuation,
    direct_accuracy,
    exact_match,
    pair_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_ten_people_are_left_out_in_turn(same: int, accuracy: float) -> None:
    truths = ["red"] * same + [f"other {i}" for i in range(10 - same)]
    assert vqa_accuracy("red", truths) == pytest.approx(accuracy)


def test_a_single_reference_answer_is_an_exact_match() -> None:
    """Left out, nothing would remain to compare with, and every answer would be wrong (LAVIS)."""
    assert vqa_accuracy("the two.", ["2"]) == 1.0
    assert vqa_accuracy("three", ["2"]) == 0.0


def test_reference_answers_are_cleaned_only_where_they_differ() -> None:
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 10) == 0.0
    assert vqa_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1.0


def test_reference_answers_keep_articles_and_number_words() -> None:
    assert vqa_accuracy("two", ["two"] * 9 + ["3"]) == 0.0
    assert vqa_accuracy("a dog", ["a dog"] * 9 + ["cat"]) == 0.0
    assert vqa_accuracy("a dog", ["dog"] * 9 + ["cat"]) == 1.0


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("black/white", "black white"),
        ("black /white", "black white"),
        ("black / white", "black  white"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("3.5 ft.", "3.5 ft"),
        ("5. 6", "5 6"),
        ("it's 50%", "it's 50%"),
        ("a-b 1,0", "ab 10"),
    ],
)
def test_signs_next_to_a_blank_are_deleted_and_others_become_blanks(text: str, cleaned: str) -> None:
    assert clean_punctuation(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\nThe  TEN dogs\t", "10 dogs"),
        ("None", "0"),
        ("dont", "don't"),
        ("Youve an oclock", "you've o'clock"),
        ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("let's", "let's"),
        ("a", ""),
    ],
)
def test_words_are_cleaned(text: str, cleaned: str) -> None:
    assert clean_answer(text) == cleaned


def test_gqa_cleans_both_sides() -> None:
    assert exact_match("a Dog!", "the dog") == 1.0
    assert exact_match("cat", "dog") == 0.0


def test_aokvqa_compares_as_written() -> None:
    assert direct_accuracy("dog", ["dog", "dog", "Dog", "cat"]) == pytest.approx(2 / 3)
    assert direct_accuracy("dog", ["dog"] * 10) == 1.0


def test_ivqa_counts_two_people_as_all() -> None:
    people = ["a dog", "dog", "Dog.", "cat", "bird"]
    assert [pair_accuracy(said, people) for said in ("dog!", "cat", "fish")] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("measure", "scores"),
    [
        ("", [0.9, 0.3, 0.0]),
        ("vqa", [0.9, 0.3, 0.0]),
        ("exact", [1.0, 1.0, 0.0]),
        ("direct", [1.0, 1 / 3, 0.0]),
        ("pairs", [1.0, 0.5, 0.0]),
        ("choice", [1.0, 1.0, 0.0]),
    ],
)
def test_every_measure_is_the_plain_count(measure: str, scores: list[float]) -> None:
    people = ["red"] * 3 + ["blue"] + [f"other {i}" for i in range(6)]
    assert [answer_accuracy(said, people, measure) for said in ("red", "blue", "green")] == pytest.approx(
        scores
    )
    assert answer_accuracy("the Red.", ["red"], measure) == 1.0  # one answer has to be equalled


def test_means_are_given_per_type() -> None:
    scores = AnswerScores()
    scores.add(1.0, "what color is", "other")
    scores.add(0.3, "is the", "yes/no")
    scores.add(0.5, "is the", "yes/no")
    scores.add(0.0)
    assert scores.means() == pytest.approx(
        {
            "overall": 45.0,
            "answer_type_other": 100.0,
            "answer_type_yes_no": 40.0,
            "question_type_is_the": 40.0,
            "question_type_what_color_is": 100.0,
        }
    )
    assert AnswerScores().means() == {}


def test_means_do_not_depend_on_the_order_of_rows() -> None:
    rows: list[tuple[float, str | None, str | None]] = [(i % 7 / 3, str(i % 3), None) for i in range(1000)]
    assert AnswerScores(rows).means() == AnswerScores(rows[::-1]).means()
