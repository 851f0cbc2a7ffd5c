from __future__ import annotations

import pytest

from blip.errors import ConfigError
from blip.processors.text import BlipCaption, BlipQuestion


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
