from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blip.errors import ConfigError
from blip.processors.text import BlipCaption, BlipInstruction, BlipQuestion, PlainText
from blip.templates import TEMPLATES


def test_caption_marks_become_spaces_and_question_marks_vanish() -> None:
    text = "Is it (Bob's), a.b: 'x-y/2'?"
    assert BlipCaption()(text) == "is it bob's , a b 'x-y/2'?"
    assert BlipQuestion()(text) == "is it bob's, ab 'x-y/2'?"


def test_the_prompt_does_not_count_as_words() -> None:
    assert BlipCaption("a photo of ", max_words=2)("One two three") == "a photo of one two"


@pytest.mark.parametrize("processor", [BlipCaption, BlipQuestion])
def test_a_limit_below_one_word_is_refused(processor: type) -> None:
    with pytest.raises(ConfigError, match="max_words: 0 leaves no text"):
        processor(max_words=0)


@pytest.mark.parametrize("text", ["", "  ", "!!!", "\n", "...  ***", "\t"])
def test_a_caption_without_words_is_blank(text: str) -> None:
    assert BlipCaption()(text).strip() == ""


def test_other_scripts_and_accents_are_kept() -> None:
    assert BlipCaption()("Ein Bär, 日本の犬! Ünïcode") == "ein bär, 日本の犬 ünïcode"


def test_plain_text_stays_as_it_is() -> None:
    assert PlainText()("  What's (this)? \n") == "What's (this)?"
    assert PlainText(max_words=2)("One two Three") == "One two"
    with pytest.raises(ConfigError, match="max_words: 0 leaves no text"):
        PlainText(max_words=0)


def test_lavis_s_instruction_processor_does_what_its_task_says() -> None:
    rng = np.random.default_rng(0)
    lower = {name: {text.lower() for text in TEMPLATES[name]} for name in ("caption", "vqa")}
    caption = BlipInstruction()  # LAVIS's defaults: pictures, captions, 50 words
    assert (caption.modality, caption.task, caption.max_words, caption.templates) == (
        "image",
        "caption",
        50,
        "caption",
    )
    assert {caption("", rng) for _ in range(200)} == lower["caption"]
    assert caption("A dog. (Big!)") == "a dog big"
    asked = BlipInstruction(task="qa", prompt="Look: ", modality="video")
    assert asked.templates == "vqa"
    found = {asked("Why??", rng) for _ in range(200)}
    assert found == {
        "look: " + text.replace("{question}", "why?").replace("??", "?") for text in lower["vqa"]
    }
    judged = BlipInstruction(task="eval", prompt="a short description", max_words=2)
    assert (judged.templates, judged(""), judged("One, two. Three")) == (
        None,
        "a short description",
        "one, two",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "classification"}, "task: no 'classification'; did you mean 'caption'"),
        ({"modality": "pc"}, "modality: no 'pc'"),
        ({"max_words": 0}, "max_words: 0 leaves no text"),
    ],
)
def test_instructions_that_are_not_made_here_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlipInstruction(**options)
