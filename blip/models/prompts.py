"""Prompts of the models with a language model: how questions, words, choices and dialogs stand in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blip.errors import UsageError
from blip.templates import HISTORY, lettered, words_read

PLACE = "{}"
"""Where a prompt takes a text."""
PREFIXES = {
    "context": "context: {}. ",
    "history": HISTORY,
    "caption": 'This image has the caption "{}". ',
}
"""What may be known about a picture, in the order in which it is put in front of a question (LAVIS)."""


def filled(prompt: str, values: Sequence[str]) -> str:
    """`prompt` with its first places filled in order; what is filled in is not looked at again."""
    count = min(prompt.count(PLACE), len(values))
    parts = prompt.split(PLACE, count)
    return "".join(a + b for a, b in zip(parts, [*values[:count], ""], strict=True))


def one_each(prompt: str | Sequence[str], rows: int) -> list[str]:
    """A prompt per picture.

    Args:
        prompt: one for all, or one each.
        rows: number of pictures.

    Raises:
        UsageError: neither.
    """
    prompts = [prompt] * rows if isinstance(prompt, str) else list(prompt)
    if len(prompts) != rows:
        raise UsageError(f"prompt: {len(prompts)} prompts for {rows} pictures; give one, or one each")
    return prompts


def with_words(prompts: Sequence[str], read: Sequence[Sequence[str]]) -> list[str]:
    """Prompts with the words that were read in the pictures in their first place, where they have one."""
    return [filled(prompt, [words_read(words)]) for prompt, words in zip(prompts, read, strict=True)]


def question_prompts(samples: Mapping[str, Any], prompt: str) -> list[str]:
    """Questions as a prompt puts them.

    Args:
        samples: `text_input`, B questions; with two places in the prompt `ocr_tokens`, which stand before the
            question, or `choices`, which stand behind it, a list each.
        prompt: with a place for the question, or two.

    Raises:
        UsageError: two places, and nothing for one of them.
    """
    texts = as_list(samples["text_input"])
    if prompt.count(PLACE) < 2:
        return [filled(prompt, [text]) for text in texts]
    if "ocr_tokens" in samples:
        pairs = [(words_read(w), text) for w, text in zip(samples["ocr_tokens"], texts, strict=True)]
    elif "choices" in samples:
        pairs = [(text, lettered(some)) for text, some in zip(texts, samples["choices"], strict=True)]
    else:
        raise UsageError(
            f"prompt: {prompt!r} has two places, and the samples have neither ocr_tokens nor choices"
        )
    return [filled(prompt, pair) for pair in pairs]


def class_prompts(samples: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
    """Prompts of ranking: what is known about a picture stands in front of the question.

    Args:
        samples: optional `text_input`, a text per picture, or a list of them for a prompt with several
            places; optional `context`, `history` (of a dialog) and `caption`, one each.
        prompts: one per picture; an empty one is the text itself.
    """
    found = []
    for row, prompt in enumerate(prompts):
        values = as_list(_of_row(samples, "text_input", row))
        asked = filled(prompt, values) if prompt else " ".join(values)
        for key, form in PREFIXES.items():
            known = _of_row(samples, key, row)
            asked = filled(form, [known]) + asked if known else asked
        found.append(asked)
    return found


def split_text(text: str, place: float) -> tuple[str, str]:
    """A text in two: a random number of words, none to all but one, and the rest (prefix LM).

    Args:
        text: of at least one word.
        place: in [0, 1).
    """
    words = text.split()
    count = int(place * len(words))
    return " ".join(words[:count]), " ".join(words[count:])


def without(prompt: str, text: str) -> str:
    """A text without the prompt that it may begin with."""
    words, begin = text.split(), prompt.split()
    return " ".join(words[len(begin) :] if words[: len(begin)] == begin else words)


def as_list(texts: str | Sequence[str]) -> list[str]:
    """LAVIS takes one text in place of a list of one."""
    return [texts] if isinstance(texts, str) else list(texts)


def _of_row(samples: Mapping[str, Any], key: str, row: int) -> Any:
    """What a picture has under a key; one text may be for all. Nothing: an empty list."""
    found = samples.get(key)
    return found if isinstance(found, str) else [] if found is None else found[row]
