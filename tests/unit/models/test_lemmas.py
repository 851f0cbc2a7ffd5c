"""Answers reduced to lemmas; spaCy itself is an extra, so that a stand-in tags words here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from blip.errors import UsageError
from blip.models import lemmas
from blip.models.lemmas import lemmatize


class Word(NamedTuple):
    """What spaCy says of one word."""

    text: str
    pos_: str
    lemma_: str


WORDS = {"cats": Word("cats", "NOUN", "cat"), "running": Word("running", "VERB", "run")}


class Pipe:
    """Stands in for spaCy's model."""

    def pipe(self, texts: Sequence[str]) -> Iterator[list[Word]]:
        """Words of each text."""
        return ([WORDS.get(word, Word(word, "ADJ", "?")) for word in text.split()] for text in texts)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    lemmas._spacy.cache_clear()
    yield
    lemmas._spacy.cache_clear()


def test_nouns_and_verbs_are_reduced_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    spacy: Any = ModuleType("spacy")
    spacy.load = lambda name: {"en_core_web_sm": Pipe()}[name]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    assert lemmatize(["two cats", "running", "better"]) == ["two cat", "run", "better"]


def test_without_spacy_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UsageError, match="pip install spacy and python -m spacy download en_core_web_sm"):
        lemmatize(["cats"])
