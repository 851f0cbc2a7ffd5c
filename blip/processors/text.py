"""LAVIS's text processors by name: caption and question cleaning, instructions; and text as it stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.random import Generator

from blip.errors import ConfigError, hint
from blip.registry import PROCESSORS
from blip.templates import TEMPLATES

_PUNCTUATION = re.compile(r"""[.!"()*#:;~]""")
_SPACES = re.compile(r"\s{2,}")


@PROCESSORS.register("blip_caption")
@dataclass
class BlipCaption:
    """Lower-cased caption: `. ! " ( ) * # : ; ~` become spaces; commas, apostrophes, hyphens, "?" stay."""

    prompt: str = ""
    """Put in front of the cleaned caption, and not counted as words."""
    max_words: int = 50
    """Words kept; what follows is cut off."""

    def __post_init__(self) -> None:
        _check(self.max_words)

    def __call__(self, text: str) -> str:
        """The cleaned caption behind the prompt."""
        text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
        return self.prompt + _first_words(text.rstrip("\n").strip(" "), self.max_words)


@PROCESSORS.register("blip_question")
@dataclass
class BlipQuestion:
    """Lower-cased question: the same marks are deleted, without a space in their place; "?" stays."""

    max_words: int = 50
    """Words kept; what follows is cut off."""

    def __post_init__(self) -> None:
        _check(self.max_words)

    def __call__(self, text: str) -> str:
        """The cleaned question."""
        return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), self.max_words)


@PROCESSORS.register("plain_text")
@dataclass
class PlainText:
    """Text as it stands, without blanks around it: what instruction data is made of."""

    max_words: int | None = None
    """Words kept; what follows is cut off. None: all."""

    def __post_init__(self) -> None:
        if self.max_words is not None:
            _check(self.max_words)

    def __call__(self, text: str) -> str:
        """The text."""
        text = text.strip()
        return text if self.max_words is None else _first_words(text, self.max_words)


@PROCESSORS.register("blip_instruction")
@dataclass
class BlipInstruction:
    """LAVIS's instructions: lower-cased templates, drawn at random, and the cleaning of what goes with them.

    A dataset with this processor is trained on with the templates of `task`. The lists are those of the
    InstructBLIP paper; LAVIS's own belong to its successor.
    """

    prompt: str = ""
    """Put in front of an instruction; for `eval`, what stands for an empty text."""
    max_words: int = 50
    """Words of a cleaned text kept; what follows is cut off."""
    modality: Literal["image", "video"] = "image"
    """What the instructions are about; the lists serve both."""
    task: Literal["caption", "qa", "eval"] = "caption"
    """`caption`: an empty text becomes an instruction, any other is cleaned. `qa`: a question becomes one.
    `eval`: a text is cleaned, and the prompt stands for an empty one."""

    lists: ClassVar[dict[str, str]] = {"caption": "caption", "qa": "vqa"}

    def __post_init__(self) -> None:
        _check(self.max_words)
        for key, known in (("modality", ("image", "video")), ("task", ("caption", "qa", "eval"))):
            if getattr(self, key) not in known:
                raise ConfigError(f"{key}: no {getattr(self, key)!r}{hint(str(getattr(self, key)), known)}")

    @property
    def templates(self) -> str | None:
        """Name of the list that `task` draws from."""
        return self.lists.get(self.task)

    def __call__(self, text: str, rng: Generator | None = None) -> str:
        """The instruction, or the cleaned text; see `task`."""
        if self.task == "eval":
            return self.clean(text) if text else self.prompt
        if self.task == "caption" and text:
            return self.clean(text)
        rng = np.random.default_rng() if rng is None else rng
        listed = TEMPLATES[self.lists[self.task]]
        template = listed[int(rng.integers(len(listed)))]
        return self.instruction(template.replace("{question}", text))

    def clean(self, text: str) -> str:
        """The text that goes with an instruction: cleaned as captions are; a question is lower-cased only."""
        if self.task == "qa":
            return text.lower().strip()
        return BlipCaption(max_words=self.max_words)(text)

    def instruction(self, text: str) -> str:
        """An instruction as LAVIS words it: behind the prompt, in lower case."""
        return (self.prompt + text.replace("??", "?")).lower().strip()


def _first_words(text: str, count: int) -> str:
    # Split at single spaces only, as the originals do: a run of spaces counts as empty words.
    words = text.split(" ")
    return text if len(words) <= count else " ".join(words[:count])


def _check(max_words: int) -> None:
    if max_words < 1:
        raise ConfigError(f"max_words: {max_words} leaves no text; give 1 or more (BLIP uses 30 to 50)")
