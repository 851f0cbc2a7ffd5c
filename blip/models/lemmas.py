"""Answers reduced to lemmas, as BLIP-2 does for OK-VQA, by spaCy, which has to be installed besides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from blip.errors import UsageError

MODEL = "en_core_web_sm"
"""LAVIS's choice."""


def lemmatize(answers: Sequence[str]) -> list[str]:
    """Answers with nouns and verbs in their basic form; other words stay.

    Raises:
        UsageError: spaCy or its English model is not installed.
    """
    texts = _spacy().pipe(answers)
    return [" ".join(t.lemma_ if t.pos_ in ("NOUN", "VERB") else t.text for t in text) for text in texts]


@cache
def _spacy() -> Any:
    try:
        import spacy

        return spacy.load(MODEL)
    except (ImportError, OSError) as error:
        raise UsageError(
            f"apply_lemmatizer: spaCy with its model {MODEL} is not installed ({error}); run"
            f" pip install spacy and python -m spacy download {MODEL}, or set apply_lemmatizer: false"
        ) from error
