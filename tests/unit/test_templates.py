"""Templates: which lists there are, what a place takes, and what is left out."""

from __future__ import annotations

import pytest

from blip.templates import MAIN, OF_KIND, TEMPLATES, fill, lettered, named, places, problems, resolve


def test_the_paper_s_lists_have_thirteen_ten_and_six_templates() -> None:
    assert [len(TEMPLATES[name]) for name in ("caption", "vqa", "vqg")] == [13, 10, 6]
    assert all(len(set(several)) == len(several) for several in TEMPLATES.values())
    assert {*OF_KIND.values()} <= set(TEMPLATES)
    assert {*OF_KIND} >= {*MAIN}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_list_has_known_places_only(name: str) -> None:
    assert problems(name) == []
    assert problems(list(TEMPLATES[name])) == []
    shown = {"caption": 0, "vqa": 1, "vqg": 1, "ocr_caption": 1, "ocr_vqa": 2, "choice": 3, "dialog": 2}
    expected = shown.get(name, 1)
    assert {len(places(template)) for template in TEMPLATES[name]} == {expected}


def test_names_and_templates_stand_in_one_list() -> None:
    assert resolve("Look: {}") == ["Look: {}"]
    assert resolve(["statement", "True? {sentence}"]) == [*TEMPLATES["statement"], "True? {sentence}"]
    assert named("{} {answer} {}", "question") == "{question} {answer} {question}"


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("Q: {question} A:", {"question": "why?"}, "Q: why? A:"),
        ("[OCR tokens: {ocr}. ]{question}", {"ocr": "a, b", "question": "why?"}, "OCR tokens: a, b. why?"),
        ("[OCR tokens: {ocr}. ]{question}", {"ocr": "", "question": "why?"}, "why?"),
        ("[OCR tokens: {ocr}. ]{question}", {"question": "why?"}, "why?"),
        ("a [part] without places", {}, "a [part] without places"),
        ("{question}", {"question": "what is [x] {answer}?", "answer": "y"}, "what is [x] {answer}?"),
    ],
)
def test_places_are_filled_and_parts_without_a_value_left_out(
    template: str, values: dict[str, str], expected: str
) -> None:
    assert fill(template, values) == expected


def test_a_place_without_a_value_is_named() -> None:
    with pytest.raises(KeyError, match="context"):
        fill("{context} {question}", {"question": "why?", "context": ""})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("captoin", "no list 'captoin'; did you mean 'caption'?"),
        (["vqa", "Q: {qestion}"], "'Q: {qestion}' has no place {qestion}; did you mean 'question'?"),
        ([], "the list is empty; name one of caption"),
        (" ", "an empty text is no template"),
    ],
)
def test_mistakes_are_named_with_the_nearest(given: str | list[str], problem: str) -> None:
    (found,) = problems(given)
    assert problem in found


def test_choices_have_letters() -> None:
    assert lettered(["red", "a dog"]) == "(a) red (b) a dog"
