"""LAVIS's text processors by name: caption and question cleaning."""

from __future__ import annotations

import re
from dataclasses import dataclass

from blip.errors import ConfigError
from blip.registry import PROCESSORS

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


def _first_words(text: str, count: int) -> str:
    # Split at single spaces only, as the originals do: a run of spaces counts as empty words.
    words = text.split(" ")
    return text if len(words) <= count else " ".join(words[:count])


def _check(max_words: int) -> None:
    if max_words < 1:
        raise ConfigError(f"max_words: {max_words} leaves no text; give 1 or more (BLIP uses 30 to 50)")
