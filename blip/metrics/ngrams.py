"""BLEU and CIDEr-D of tokenised captions, with pycocoevalcap's formulas, as operations on whole tables.

An n-gram is a number; a table row is one n-gram of one caption with its count. What pycocoevalcap looks up in
dictionaries, caption by caption, is here a join of sorted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4
"""Longest n-gram."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty on lengths."""


@dataclass
class _Table:
    """n-grams of one order, one row per caption and different n-gram, sorted by caption."""

    caption: np.ndarray
    """int64 (R,)."""
    gram: np.ndarray
    """int64 (R,), number of the n-gram."""
    count: np.ndarray
    """int64 (R,), how often it is in the caption."""
    num_grams: int


@dataclass
class NgramCounts:
    """n-grams of candidates and references of a corpus.

    Args:
        candidates: one text per image, tokens with blanks between them.
        references: at least one text per image.
    """

    candidates: Sequence[str]
    references: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        self.num_images = len(self.candidates)
        texts = [*self.candidates, *(text for group in self.references for text in group)]
        self.num_references = np.array([len(group) for group in self.references], dtype=np.int64)
        own = np.arange(self.num_images)
        self.image = np.concatenate([own, np.repeat(own, self.num_references)])
        """int64 (captions,): the image of each caption; candidates come first."""
        words = [text.split() for text in texts]
        self.length = np.array([len(some) for some in words], dtype=np.int64)
        self.tables = _tables(words, self.length)

    def bleu(self) -> list[float]:
        """BLEU-1 to BLEU-4 of the corpus, with the closest reference lengths; 0 to 1."""
        reference_length = self._closest_lengths().sum()
        length = self.length[: self.num_images].sum()
        scores, product = [], 1.0
        for order, table in enumerate(self.tables, start=1):
            right = self._clipped(table)
            guessed = np.maximum(self.length[: self.num_images] - order + 1, 0).sum()
            product *= (float(right) + 1e-15) / (float(guessed) + 1e-9)
            scores.append(product ** (1 / order))
        ratio = (float(length) + 1e-15) / (float(reference_length) + 1e-9)
        return [score * float(np.exp(1 - 1 / ratio)) if ratio < 1 else score for score in scores]

    def cider(self) -> np.ndarray:
        """CIDEr-D of each image, float64 (images,), 0 to 10; that of the corpus is the mean.

        Document frequencies are those of the references at hand: scores of a part of a dataset differ from
        its scores within the whole.
        """
        first = self.num_images
        owner = self.image[first:]
        # pycocoevalcap measures lengths in bigrams.
        bigrams = np.maximum(self.length - 1, 0)
        distance = bigrams[owner] - bigrams[first:]
        penalty = np.exp(-(distance.astype(np.float64) ** 2) / (2 * SIGMA**2))
        total = np.zeros(len(owner))
        for table in self.tables:
            weight = self._weights(table)
            norm = np.sqrt(np.bincount(table.caption, weight**2, minlength=len(self.image)))
            rows, match = self._join(table)
            overlap = np.minimum(weight[match], weight[rows]) * weight[rows]
            found = np.bincount(table.caption[rows] - first, overlap, minlength=len(owner))
            scale = norm[owner] * norm[first:]
            total += np.divide(found, scale, out=np.zeros(len(owner)), where=scale != 0) * penalty
        per_image = np.bincount(owner, total / ORDERS, minlength=first)
        return 10 * per_image / np.maximum(self.num_references, 1)

    def _closest_lengths(self) -> np.ndarray:
        """Of each image the reference length nearest to the candidate's; the shorter one of two."""
        first = self.num_images
        owner, lengths = self.image[first:], self.length[first:]
        order = np.lexsort((lengths, np.abs(lengths - self.length[owner]), owner))
        starts = np.cumsum(self.num_references) - self.num_references
        return lengths[order][starts]

    def _clipped(self, table: _Table) -> int:
        """n-grams of all candidates that are in a reference, each as often as in one reference at most."""
        rows, match = self._join(table)
        most = np.zeros(len(table.count), dtype=np.int64)
        np.maximum.at(most, match, table.count[rows])
        return int(np.minimum(most, table.count).sum())

    def _weights(self, table: _Table) -> np.ndarray:
        """TF-IDF of each row. What no reference has counts as if one image had it."""
        in_references = table.caption >= self.num_images
        keys = self.image[table.caption] * table.num_grams + table.gram
        images = np.bincount(np.unique(keys[in_references]) % table.num_grams, minlength=table.num_grams)
        idf = np.log(float(self.num_images)) - np.log(np.maximum(images, 1.0))
        return table.count * idf[table.gram]

    def _join(self, table: _Table) -> tuple[np.ndarray, np.ndarray]:
        """Rows of references whose n-gram the image's candidate has too, and the candidate's rows."""
        keys = self.image[table.caption] * table.num_grams + table.gram
        split = int(np.searchsorted(table.caption, self.num_images))
        if not split:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        place = np.searchsorted(keys[:split], keys[split:])  # rows of a caption are sorted by n-gram
        place = np.minimum(place, split - 1)
        same = keys[place] == keys[split:]
        return np.flatnonzero(same) + split, place[same]


def _tables(words: list[list[str]], lengths: np.ndarray) -> list[_Table]:
    """The table of every order."""
    numbers: dict[str, int] = {}
    flat = np.array([numbers.setdefault(w, len(numbers)) for some in words for w in some], dtype=np.int64)
    caption = np.repeat(np.arange(len(words)), lengths)
    # Tokens from each one to the end of its caption, itself included.
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))
    tables, gram, at = [], flat, np.arange(len(flat))
    for order in range(1, ORDERS + 1):
        if order > 1:
            longer = left[at] >= order
            at = at[longer]
            gram = gram[longer] * max(len(numbers), 1) + flat[at + order - 1]
        _, gram = np.unique(gram, return_inverse=True)
        num_grams = int(gram.max()) + 1 if len(gram) else 1
        rows, count = np.unique(caption[at] * num_grams + gram, return_counts=True)
        tables.append(_Table(rows // num_grams, rows % num_grams, count, num_grams))
    return tables
