"""Instructions as templates: named lists of them, and how their places are filled.

A place `{question}` takes the record's question; `{}` is the main one of its kind of records. A part in
brackets, `[OCR tokens: {ocr}. ]`, is left out where a record has nothing for a place in it. A template of
questions that shows `{answer}` asks for the question, one that shows `{choices}` for the right choice, and
any other for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from blip.errors import hint

SLOTS = ("question", "answer", "choices", "ocr", "context", "history", "caption", "sentence")
"""Places that templates may have."""

_PLACE = re.compile(r"\{(\w*)\}")
_PART = re.compile(r"\[([^\[\]]*)\]")
_NAME = re.compile(r"\w+")

# InstructBLIP, appendix C, as several public code bases that follow it agree on; the paper was not at hand.
_CAPTION = (
    "A short image caption:",
    "A short image description:",
    "A photo of",
    "An image that shows",
    "Write a short description for the image.",
    "Write a description for the photo.",
    "Provide a description of what is presented in the photo.",
    "Briefly describe the content of the image.",
    "Can you briefly explain what you see in the image?",
    "Could you use a few words to describe what you perceive in the photo?",
    "Please provide a short depiction of the picture.",
    "Using language, provide a short account of the image.",
    "Use a few words to illustrate what is happening in the picture.",
)
_VQA = (
    "{question}",
    "Question: {question}",
    "{question} A short answer to the question is",
    "Q: {question} A:",
    "Question: {question} Short answer:",
    "Given the image, answer the following question with no more than three words. {question}",
    "Based on the image, respond to this question with a short answer: {question}. Answer:",
    "Use the provided image to answer the question: {question} Provide your answer as short as possible:",
    'What is the answer to the following question? "{question}"',
    'The question "{question}" can be answered using the image. A short answer is',
)
_VQG = (
    "Given the image, generate a question whose answer is: {answer}. Question:",
    "Based on the image, provide a question with the answer: {answer}. Question:",
    'Given the visual representation, create a question for which the answer is "{answer}".',
    "From the image provided, craft a question that leads to the reply: {answer}. Question:",
    "Considering the picture, come up with a question where the answer is: {answer}.",
    "Taking the image into account, generate an question that has the answer: {answer}. Question:",
)
_OCR = "[OCR tokens: {ocr}. ]"

TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": _CAPTION,
    "vqa": _VQA,
    "vqg": _VQG,
    # Words that were read in the picture stand in front (InstructBLIP, section 2.2).
    "ocr_caption": tuple(_OCR + text for text in _CAPTION),
    "ocr_vqa": tuple(_OCR + text for text in _VQA),
    # One each: the prompt that the paper evaluates with, the context as LAVIS puts it in front.
    "choice": ("[context: {context}. ]Question: {question} Options: {choices}. Short answer:",),
    "dialog": ("[Dialog history: {history}\n ]Question: {question} Short answer:",),
    "statement": ('Based on the image, is this statement true or false? "{sentence}" Answer:',),
    "hateful": ('This is an image with: "{sentence}" written on it. Is it hateful? Answer:',),
    "sentence": ("{sentence}",),
}
"""Lists by name. The first of a list is the one that evaluation takes."""

OF_KIND = {"caption": "caption", "vqa": "vqa", "classification": "sentence"}
"""Kind of records -> the list that it takes where none is named."""
MAIN = {"vqa": "question", "classification": "sentence"}
"""Kind of records -> what the place `{}` stands for."""

HISTORY = "dialog history: {}\n"
"""Earlier turns, in front of a message (LAVIS)."""
WORDS_READ = 30
"""Words read in a picture that an instruction shows at most (InstructBLIP in LAVIS)."""


def resolve(given: str | Sequence[str]) -> list[str]:
    """The templates that names of lists and templates stand for, in order."""
    several = [given] if isinstance(given, str) else given
    return [text for item in several for text in TEMPLATES.get(item, (item,))]


def places(template: str) -> list[str]:
    """Names of the places of a template, in order; empty for `{}`."""
    return _PLACE.findall(template)


def problems(given: str | Sequence[str]) -> list[str]:
    """What is wrong with names of lists and templates; empty if nothing is."""
    several = [given] if isinstance(given, str) else list(given)
    found = [] if several else ["the list is empty; name one of " + ", ".join(TEMPLATES)]
    for item in several:
        if item in TEMPLATES:
            continue
        if not item.strip():
            found.append("an empty text is no template")
        elif _NAME.fullmatch(item):
            found.append(f"no list {item!r}{hint(item, TEMPLATES)}")
        else:
            unknown = [name for name in places(item) if name and name not in SLOTS]
            found += [f"{item!r} has no place {{{name}}}{hint(name, SLOTS)}" for name in unknown]
    return found


def named(template: str, main: str) -> str:
    """The template with `main` as the name of its nameless places."""
    return template.replace("{}", f"{{{main}}}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The instruction of a record.

    Args:
        template: with names in all places.
        values: for the places; what is empty counts as missing.

    Raises:
        KeyError: a place outside of brackets has no value; its argument is the name.
    """

    def part(found: re.Match[str]) -> str:
        inside = places(found[1])
        if not inside:
            return found[0]
        return found[1] if all(values.get(name) for name in inside) else ""

    def value(found: re.Match[str]) -> str:
        if not values.get(found[1]):
            raise KeyError(found[1])
        return values[found[1]]

    return _PLACE.sub(value, _PART.sub(part, template))


def lettered(choices: Sequence[str]) -> str:
    """Choices as InstructBLIP shows them: `(a) red (b) blue`."""
    return " ".join(f"({chr(ord('a') + number)}) {choice}" for number, choice in enumerate(choices))


def words_read(words: Sequence[str]) -> str:
    """The first words that were read in a picture, with commas between them."""
    return ", ".join(words[:WORDS_READ])


def dialog(message: str, turns: Sequence[tuple[str, str]]) -> str:
    """A message behind the turns, (message, reply), that went before."""
    said = "\n".join(f"User: {said}\nAssistant: {reply}" for said, reply in turns)
    return HISTORY.format(said) + message if said else message
