"""Caption scores against pycocoevalcap: run where it and Java are found, its stored values elsewhere.

goldens/ptb_tokens.json holds texts, in this order, with the tokens of pycocoevalcap's PTBTokenizer;
goldens/caption_scores.json captions, each followed by its references, with all scores.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import shutil
from pathlib import Path

import pytest

from blip.metrics import java, ptb
from blip.metrics.caption import caption_scores, unavailable

FOLDER = Path(__file__).parent / "goldens"
HAS_JAVA = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
needs_java = pytest.mark.skipif(not HAS_JAVA, reason="needs Java and pycocoevalcap")

WORDS = (
    "a man woman dog cat riding on the street red bus with umbrella two people standing near table "
    "pizza white plate train tracks next to in of and sitting bench field man's isn't don't it's 2 10 "
    "20th 5:30 half-eaten t-shirt Mr. St. U.S. TV's couple's p.m. No. black-and-white caf\xe9 na\xefve "
    "1/2 $5 12-year-old cannot"
)
ODD = (
    "|.|...|?!|-|  |\"|'s|\U0001f600|\u65e5\u672c\u8a9e \u5e97|the letter t.|see no.|5 dogs|"
    "\u201cHi\u201d, he\u2019s|(a) [b] {c}|a\u2014b \u2013 c\u2026|R&B AT&T &amp; x|"
    "http://a.com/b @me #tag :) ;-)|1 1/2 cups|(555) 555-1234|caf\xe9\u0301|rock'n'roll in the '90s|"
    "e.g. this, etc. The end|\xbd of \xa35|a\xa0b\tc|<b>bold</b> x < y|---- ***|O'Brien's ma'am"
)
Corpus = tuple[list[str], list[list[str]]]


def corpus(seed: int, images: int) -> Corpus:
    """Captions and five references each; about one text in twelve is odd or empty."""
    rng = random.Random(seed)
    words, odd = WORDS.split(), ODD.split("|")

    def text(base: list[str]) -> str:
        if rng.random() < 0.08:
            return rng.choice(odd)
        said = [rng.choice(words) if rng.random() < 0.3 else word for word in base]
        found = " ".join(said) + rng.choice([".", ".", "", " .", "!", "..."])
        return found[0].upper() + found[1:] if rng.random() < 0.5 else found

    captions, references = [], []
    for _ in range(images):
        base = [rng.choice(words) for _ in range(rng.randint(5, 13))]
        captions.append(text(base))
        references.append([text(base) for _ in range(5)])
    return captions, references


def official(captions: list[str], references: list[list[str]], meteor: bool = False) -> dict[str, float]:
    """pycocoevalcap's scores."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({i: [{"caption": c} for c in group] for i, group in enumerate(references)})
    said = tokenizer.tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(truth, said)
    found = {f"Bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)}
    if meteor:
        found["METEOR"] = float(Meteor().compute_score(truth, said)[0])
    found["ROUGE_L"] = float(Rouge().compute_score(truth, said)[0])
    found["CIDEr"] = float(Cider().compute_score(truth, said)[0])
    return found


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "problem", lambda *jars: "told not to")


def test_tokens_are_those_of_stanfords_tokenizer() -> None:
    rows = json.loads((FOLDER / "ptb_tokens.json").read_text(encoding="utf-8"))
    assert len(rows) > 1000
    found = ptb.tokenize([text for text, _ in rows])
    assert [row for row, tokens in zip(rows, found, strict=True) if row[1] != tokens] == []


@pytest.mark.usefixtures("no_java")
def test_scores_are_the_stored_ones_without_java() -> None:
    stored = json.loads((FOLDER / "caption_scores.json").read_text(encoding="utf-8"))
    captions, references = [row[0] for row in stored["rows"]], [row[1:] for row in stored["rows"]]
    expected = {name: value for name, value in stored["scores"].items() if name != "METEOR"}
    assert caption_scores(captions, references) == pytest.approx(expected, abs=1e-9)


@needs_java
@pytest.mark.slow  # METEOR reads its table of paraphrases for 20 seconds
def test_all_scores_are_the_stored_ones_with_java() -> None:
    stored = json.loads((FOLDER / "caption_scores.json").read_text(encoding="utf-8"))
    captions, references = [row[0] for row in stored["rows"]], [row[1:] for row in stored["rows"]]
    assert "METEOR" not in unavailable()
    assert caption_scores(captions, references, ["METEOR"]) == pytest.approx(stored["scores"], abs=1e-9)


@needs_java
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_pycocoevalcaps_with_java_and_without(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    captions, references = corpus(seed, 400)
    expected = official(captions, references)
    assert caption_scores(captions, references, []) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(java, "problem", lambda *jars: "told not to")
    assert caption_scores(captions, references, []) == pytest.approx(expected, abs=1e-9)


@needs_java
def test_spice_says_why_it_is_not_available_or_scores() -> None:
    """pycocoevalcap would download its models; here nothing is fetched."""
    if "SPICE" in unavailable():
        assert "stanford-corenlp-3.6.0" in unavailable()["SPICE"]
    else:
        same = ["a red dog on the grass"]
        assert caption_scores(same, [same], ["SPICE"])["SPICE"] == pytest.approx(1.0)
