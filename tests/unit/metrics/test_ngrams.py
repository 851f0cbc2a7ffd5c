"""Facts about BLEU and CIDEr: dictionaries and plain loops agree with the tables."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from blip.metrics.ngrams import NgramCounts

WORDS = ["a", "dog", "cat", "on", "the", "red", "mat", "runs", "sits"]
Corpus = tuple[list[str], list[list[str]]]


def corpus(seed: int, images: int = 12) -> Corpus:
    """Short captions of few words, empty ones among them, and one to four references each."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(0, 9)))

    return [text() for _ in range(images)], [
        [text() for _ in range(rng.integers(1, 5))] for _ in range(images)
    ]


def grams(text: str, order: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def naive_bleu(candidates: list[str], references: list[list[str]]) -> list[float]:
    length = closest = 0
    right, guessed = [0] * 4, [0] * 4
    for text, group in zip(candidates, references, strict=True):
        own = len(text.split())
        length += own
        closest += min((abs(len(ref.split()) - own), len(ref.split())) for ref in group)[1]
        for order in range(1, 5):
            most: Counter[tuple[str, ...]] = Counter()
            for ref in group:
                most |= grams(ref, order)
            right[order - 1] += (grams(text, order) & most).total()
            guessed[order - 1] += max(own - order + 1, 0)
    brevity = math.exp(min(0.0, 1 - (closest + 1e-9) / (length + 1e-15)))
    shares = [(r + 1e-15) / (g + 1e-9) for r, g in zip(right, guessed, strict=True)]
    return [brevity * math.prod(shares[:n]) ** (1 / n) for n in (1, 2, 3, 4)]


def naive_cider(candidates: list[str], references: list[list[str]]) -> list[float]:
    scores = [0.0] * len(candidates)
    for order in range(1, 5):
        seen = Counter(g for group in references for g in {g for ref in group for g in grams(ref, order)})
        idf = {g: math.log(len(candidates)) - math.log(n) for g, n in seen.items()}
        default = math.log(len(candidates))
        for i, (text, group) in enumerate(zip(candidates, references, strict=True)):
            own = {g: n * idf.get(g, default) for g, n in grams(text, order).items()}
            for ref in group:
                other = {g: n * idf[g] for g, n in grams(ref, order).items()}
                overlap = sum(min(v, other[g]) * other[g] for g, v in own.items() if g in other)
                norms = math.hypot(*own.values()) * math.hypot(*other.values())
                pairs = [max(len(t.split()) - 1, 0) for t in (text, ref)]
                penalty = math.exp(-((pairs[0] - pairs[1]) ** 2) / 72)
                scores[i] += 10 / 4 / len(group) * penalty * (overlap / norms if norms else overlap)
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_bleu_is_that_of_plain_loops(seed: int) -> None:
    assert NgramCounts(*corpus(seed)).bleu() == pytest.approx(naive_bleu(*corpus(seed)), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_cider_is_that_of_plain_loops(seed: int) -> None:
    assert NgramCounts(*corpus(seed)).cider() == pytest.approx(naive_cider(*corpus(seed)), abs=1e-12)


def test_captions_of_nothing_score_nothing() -> None:
    counts = NgramCounts(["", "", ""], [["a dog"], [""], ["", "cat"]])
    assert counts.bleu() == [0.0] * 4
    assert counts.cider().tolist() == [0.0] * 3
    assert NgramCounts(["", ""], [[""], [""]]).cider().tolist() == [0.0, 0.0]


def test_a_corpus_of_one_image_has_no_rare_words() -> None:
    """Every document frequency is the whole corpus, so CIDEr is 0 even for the perfect caption."""
    counts = NgramCounts(["a red dog runs"], [["a red dog runs"]])
    assert counts.cider().tolist() == [0.0]
    assert counts.bleu() == pytest.approx([1.0] * 4)


def test_the_right_caption_has_the_highest_cider() -> None:
    right = ["a red dog runs on grass", "two cats sit on mats", "people ride big buses today"]
    assert NgramCounts(right, [[text] for text in right]).cider() == pytest.approx([10.0] * 3)
