"""Facts about caption scores: the same with and without Java, and no metric's failure costs the others."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from blip.errors import DataError
from blip.metrics import caption, java
from blip.metrics.caption import caption_scores, rouge_l, score_names, unavailable

CAPTIONS = ["A dog runs.", "two cats on a mat"]
REFERENCES = [["a dog is running", "The dog runs!"], ["Two cats sit on a mat.", "cats"]]
WITHOUT_JAVA = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "problem", lambda *jars: "no java here")


@pytest.mark.usefixtures("no_java")
def test_without_java_all_but_meteor_and_spice_is_there() -> None:
    scores = caption_scores(CAPTIONS, REFERENCES)
    assert list(scores) == WITHOUT_JAVA
    assert unavailable() == {"METEOR": "no java here", "SPICE": "no java here"}
    assert score_names(unavailable()) == WITHOUT_JAVA


def test_a_java_program_that_fails_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> float:
        raise java.JavaError("out of memory")

    monkeypatch.setattr(java, "problem", lambda *jars: None)
    monkeypatch.setattr(java, "tokenize", fails)
    monkeypatch.setattr(java, "meteor", fails)
    monkeypatch.setattr(java, "spice", lambda candidates, references: 0.25)
    with caplog.at_level(logging.WARNING):
        scores = caption_scores(CAPTIONS, REFERENCES)
    assert list(scores) == [*WITHOUT_JAVA, "SPICE"]
    assert scores["SPICE"] == 0.25
    assert "METEOR is left out: out of memory" in caplog.text
    assert "tokenised without Java: out of memory" in caplog.text


@pytest.mark.usefixtures("no_java")
def test_only_the_wanted_java_programs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "meteor", lambda candidates, references: float(len(candidates)))
    assert caption_scores(CAPTIONS, REFERENCES, ["METEOR"])["METEOR"] == 2.0
    assert "METEOR" not in caption_scores(CAPTIONS, REFERENCES, [])


def test_no_captions_give_no_scores() -> None:
    assert caption_scores([], []) == {}


def test_an_image_without_references_is_an_error() -> None:
    with pytest.raises(DataError, match="caption 1 has no reference"):
        caption_scores(CAPTIONS, [["a dog"], []])


def test_names_are_those_of_lavis() -> None:
    assert score_names() == [*caption.BLEU, "METEOR", "ROUGE_L", "CIDEr", "SPICE"]


def naive_rouge(candidate: str, references: list[str]) -> float:
    shares = []
    for reference in references:
        a, b = candidate.split(" "), reference.split(" ")
        table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
        for i, x in enumerate(a, start=1):
            for j, y in enumerate(b, start=1):
                longer = max(table[i - 1, j], table[i, j - 1])
                table[i, j] = table[i - 1, j - 1] + 1 if x == y else longer
        shares.append((table[-1, -1] / len(a), table[-1, -1] / len(b)))
    precision, recall = max(s[0] for s in shares), max(s[1] for s in shares)
    return (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_rouge_is_that_of_the_whole_table(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        texts = [" ".join(rng.choice(list("abcde"), rng.integers(0, 90))) for _ in range(4)]
        assert rouge_l(texts[0], texts[1:]) == pytest.approx(naive_rouge(texts[0], texts[1:]), abs=1e-12)
