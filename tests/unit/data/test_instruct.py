"""Instructions: of records that are some, and made of captions, questions and sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from blip.data.instruct import InstructMaker, asks_for, chosen_templates, unfit
from blip.data.kinds import kind_of
from blip.data.records import ById, PackedRecords
from blip.data.samples import MALFORMED, BadRecord
from blip.errors import ConfigError
from blip.processors.image import BlipImageEval
from blip.processors.text import BlipCaption, BlipInstruction, BlipQuestion, PlainText
from blip.templates import OF_KIND, TEMPLATES, resolve

EYES = BlipImageEval(image_size=4)
PROCESSORS: dict[str, Any] = {
    "instruct": PlainText(),
    "caption": BlipCaption(),
    "vqa": BlipQuestion(),
    "classification": BlipCaption(),
}


def made(kind: str, record: dict[str, Any], templates: str | list[str] | None = None, **more: Any) -> Any:
    """(instruction, output) of a record; without random numbers."""
    rng = more.pop("rng", None)
    text = more.pop("text", PROCESSORS[kind])
    listed = [] if kind == "instruct" else resolve(templates or OF_KIND[kind])
    maker = InstructMaker(EYES, text, kind=kind, templates=listed, **more)
    sample = maker.content(record, "mine/0", rng)
    return sample["text_input"], sample.get("text_output")


# Records that are instructions


def test_an_instruction_stands_as_it_is() -> None:
    record = {"text_input": " Count: how many?\n", "text_output": "Two, I think.", "type": "count"}
    assert made("instruct", record) == ("Count: how many?", "Two, I think.")
    assert made("instruct", record, prompt="Please. ") == ("Please. Count: how many?", "Two, I think.")
    assert made("instruct", record, text=BlipCaption()) == ("count how many?", "two, i think")  # as LAVIS


def test_of_several_outputs_one_is_drawn() -> None:
    record = {"text_input": "say", "text_output": ["a", "b"]}
    drawn = {made("instruct", record, rng=np.random.default_rng(seed))[1] for seed in range(20)}
    assert drawn == {"a", "b"}
    assert made("instruct", record)[1] == "a"


CONVERSATION = {
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "And its color?"},
        {"from": "gpt", "value": "Black."},
    ]
}


def test_a_message_of_a_conversation_comes_behind_those_before_it() -> None:
    assert made("instruct", CONVERSATION) == ("What is it?", "A dog.")
    drawn = {made("instruct", CONVERSATION, rng=np.random.default_rng(seed)) for seed in range(20)}
    history = "dialog history: User: What is it?\nAssistant: A dog.\nAnd its color?"
    assert drawn == {("What is it?", "A dog."), (history, "Black.")}


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"text_output": "x"}, "no_instruction"),
        ({"text_input": "x"}, "no_output"),
        ({"text_input": "x", "text_output": " "}, "no_output"),
        ({"text_input": ["x", "y"], "text_output": "z"}, "bad_text"),
        ({"text_input": "x", "text_output": {"a": 1}}, "bad_text"),
        ({"conversations": []}, "no_instruction"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no_instruction"),
        ({"conversations": [{"from": "gpt", "value": "x"}] * 2}, "bad_text"),
        ({"conversations": [{"from": "human", "value": 1}] * 2}, "bad_text"),
        ({MALFORMED: "line 1"}, "malformed_record"),
    ],
    ids=str,
)
def test_what_is_no_instruction_has_its_cause(record: dict[str, Any], cause: str) -> None:
    with pytest.raises(BadRecord) as caught:
        made("instruct", record)
    assert caught.value.cause == cause


# Made by templates


def test_a_caption_follows_a_template_of_captions() -> None:
    record = {"caption": "A Dog, running."}
    assert made("caption", record) == ("A short image caption:", "a dog, running")
    drawn = Counter(made("caption", record, rng=np.random.default_rng(seed))[0] for seed in range(400))
    assert set(drawn) == set(TEMPLATES["caption"])
    assert max(drawn.values()) < 80  # of 31 on average


def test_a_question_is_answered_as_often_as_people_gave_the_answer() -> None:
    record = {"question": "What (is) IT?", "answer": ["Cat", "Cat", "Cat", "dog"]}
    assert made("vqa", record) == ("what is it?", "Cat")
    rngs = [np.random.default_rng(seed) for seed in range(200)]
    drawn = Counter(made("vqa", record, ["Q: {} A:"], rng=rng) for rng in rngs)
    assert set(drawn) == {("Q: what is it? A:", "Cat"), ("Q: what is it? A:", "dog")}
    assert 120 < drawn["Q: what is it? A:", "Cat"] < 180


def test_a_template_that_shows_the_answer_asks_for_the_question() -> None:
    record = {"question": "What is it?", "answer": "a dog"}
    assert asks_for("Ask for {answer}") == "question"
    expected = ("Given the image, generate a question whose answer is: a dog. Question:", "what is it?")
    assert made("vqa", record, "vqg") == expected


def test_a_template_that_shows_choices_asks_for_the_right_one() -> None:
    record = {"question": "Which?", "choices": ["red", "blue"], "correct_choice": 1, "answer": ["azure"] * 9}
    shown = "Question: which? Options: (a) red (b) blue. Short answer:"
    assert made("vqa", record, "choice") == (shown, "blue")
    assert made("vqa", {**record, "context": "Sky."}, "choice")[0] == f"context: Sky.. {shown}"
    assert made("vqa", record)[1] == "azure"
    del record["answer"]
    assert made("vqa", record)[1] == "blue"


def test_words_read_in_the_picture_stand_in_front_where_there_are_any() -> None:
    record = {"question": "Brand?", "answer": "x", "image": "train/abc.jpg"}
    words = [f"w{i}" for i in range(40)]
    shown = "OCR tokens: " + ", ".join(words[:30]) + ". brand?"
    assert made("vqa", {**record, "ocr_tokens": words}, "ocr_vqa")[0] == shown
    assert made("vqa", record, "ocr_vqa")[0] == "brand?"
    stored = ById(PackedRecords([{"image_id": "abc", "ocr_tokens": words}]), "image_id")
    assert made("vqa", record, "ocr_vqa", ocr=stored)[0] == shown
    assert made("vqa", {**record, "ocr_tokens": []}, "ocr_vqa", ocr=stored)[0] == "brand?"
    caption = {"caption": "a sign", "image_id": "abc"}
    expected = "OCR tokens: " + ", ".join(words[:30]) + ". A short image caption:"
    assert made("caption", caption, "ocr_caption", ocr=stored) == (expected, "a sign")


def test_the_dialog_before_a_question_is_shown_if_there_is_one() -> None:
    record = {"question": "what color?", "answer": "black", "history": "q: what? a: a dog"}
    expected = "Dialog history: q: what? a: a dog\n Question: what color? Short answer:"
    assert made("vqa", record, "dialog")[0] == expected
    assert made("vqa", {**record, "history": ""}, "dialog")[0] == "Question: what color? Short answer:"


def test_a_sentence_is_judged_by_the_name_of_its_class() -> None:
    record = {"sentence": "The dog is left.", "label": 1}
    asked = 'Based on the image, is this statement true or false? "the dog is left" Answer:'
    classes = ("false", "true")
    assert made("classification", record, "statement", classes=classes) == (asked, "true")
    assert made("classification", record, ["{} Yes?"], classes=classes)[0] == "the dog is left Yes?"
    with pytest.raises(BadRecord, match="bad_label"):
        made("classification", {**record, "label": 7}, classes=classes)


@pytest.mark.parametrize(
    ("kind", "record", "templates", "cause"),
    [
        ("caption", {}, None, "no_caption"),
        ("caption", {"caption": []}, None, "no_caption"),
        ("vqa", {"answer": "x"}, None, "no_question"),
        ("vqa", {"question": "x"}, None, "no_answer"),
        ("vqa", {"question": "x", "answer": "y"}, "choice", "no_choices"),
        ("vqa", {"question": "x", "answer": "y"}, ["{context} {}"], "no_context"),
        ("vqa", {"question": ["x", "z"], "answer": "y"}, None, "bad_text"),
        ("classification", {"label": "a"}, None, "no_sentence"),
        ("classification", {"sentence": "x"}, None, "no_label"),
    ],
)
def test_what_a_template_lacks_is_the_cause(
    kind: str, record: dict[str, Any], templates: Any, cause: str
) -> None:
    with pytest.raises(BadRecord) as caught:
        made(kind, record, templates, classes=("a", "b"))
    assert caught.value.cause == cause


def test_evaluation_needs_no_output() -> None:
    assert made("caption", {}, answered=False) == ("A short image caption:", None)
    assert made("vqa", {"question": "why?"}, answered=False) == ("why?", None)
    assert made("instruct", {"text_input": "go"}, answered=False) == ("go", None)
    assert made("instruct", {"text_input": "go", "text_output": "x"}, answered=False) == ("go", None)
    assert made("instruct", {"text_input": "go", "text_output": "x"}, answered=None) == ("go", "x")
    sentence = {"sentence": "x is y"}
    assert made("classification", sentence, answered=False, classes=("a", "b")) == ("x is y", None)


def test_lavis_s_processor_words_instructions_in_lower_case() -> None:
    record = {"question": "What is it??", "answer": "A dog"}
    asked = made("vqa", record, ["Question: {} Answer:"], text=BlipInstruction(task="qa", prompt="Look. "))
    assert asked == ("look. question: what is it? answer:", "A dog")
    caption = made("caption", {"caption": "A Dog."}, text=BlipInstruction())
    assert caption == ("a short image caption:", "a dog")


# Which templates


def test_where_templates_come_from() -> None:
    def chosen(given: Any, listed: str, kind: str, wanted: str | None, train: bool) -> Any:
        return chosen_templates("mine", given, listed, kind, wanted, train)

    vqa, vqg = list(TEMPLATES["vqa"]), list(TEMPLATES["vqg"])
    assert chosen(None, "", "vqa", "vqa", True) is None  # VQA trains on answers with weights
    assert chosen("vqa", "", "vqa", "vqa", True) == vqa
    assert chosen("vqa", "", "vqa", "vqa", False) is None
    assert chosen(None, "", "vqa", "instruct", True) == vqa
    assert chosen(None, "vqg", "vqa", "instruct", False) == vqg
    assert chosen(["Tell."], "vqg", "vqa", "instruct", False) == ["Tell."]
    assert chosen(None, "", "caption", "instruct", False) == list(TEMPLATES["caption"])
    assert chosen(None, "", "instruct", None, True) == []


@pytest.mark.parametrize(
    ("kind", "template", "problem"),
    [
        ("instruct", "x", "are instructions already"),
        ("nlvr", "x", "take no instructions"),
        ("caption", "{question}", "have nothing for the place {question} of '{question}'"),
        ("caption", "{}", "have nothing for the place {} of '{}'"),
        ("classification", "{answer}", "have nothing for the place {answer}"),
        ("vqa", "{} {sentence}", "have nothing for the place {sentence}"),
    ],
)
def test_templates_have_to_fit_the_records(kind: str, template: str, problem: str) -> None:
    assert problem in unfit([template], kind)
    with pytest.raises(ConfigError, match=rf"datasets\.mine\.templates: its records are of kind {kind}"):
        chosen_templates("mine", [template], "", kind, "instruct", True)


@pytest.mark.parametrize(
    ("columns", "wanted", "kind"),
    [
        (["image", "text_input", "text_output"], None, "instruct"),
        (["image", "conversations"], None, "instruct"),
        (["image", "text_input", "text_output", "type"], "instruct", "instruct"),
        (["image", "caption", "text_input", "text_output"], "caption", "caption"),
        (["image", "caption"], "instruct", "caption"),
        (["image", "question", "answer"], "instruct", "vqa"),
        (["image", "sentence", "label"], "instruct", "classification"),
        (["image", "text_input", "label"], None, "classification"),
    ],
)
def test_instructions_are_known_by_their_columns(columns: list[str], wanted: str | None, kind: str) -> None:
    assert kind_of(columns, wanted) == kind
