"""The COCO caption metrics under LAVIS's names, with pycocoevalcap's values.

BLEU, ROUGE-L and CIDEr need nothing but this package. METEOR and SPICE are Java programs that pycocoevalcap
brings; where they cannot be run, `unavailable` says why, before anything is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from blip.errors import DataError
from blip.metrics import java, ptb
from blip.metrics.ngrams import NgramCounts

log = logging.getLogger(__name__)

BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
JAVA_SCORES = {
    "METEOR": (java.METEOR_JAR,),
    "SPICE": (java.SPICE_JAR, *java.SPICE_MODELS),
}
"""Metrics that are Java programs, and their jars."""
ROUGE_BETA = 1.2


def unavailable() -> dict[str, str]:
    """The metrics that cannot be computed on this machine, each with the reason; starts Java once."""
    found = {name: java.problem(*jars) for name, jars in JAVA_SCORES.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def score_names(skip: Collection[str] = ()) -> list[str]:
    """Names of what `caption_scores` gives, without those in `skip`."""
    names = [*BLEU, "METEOR", "ROUGE_L", "CIDEr", "SPICE"]
    return [name for name in names if name not in skip]


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], java_scores: Collection[str] | None = None
) -> dict[str, float]:
    """Scores of one caption per image, with pycocoevalcap's scale: CIDEr from 0 to 10, all others to 1.

    Args:
        captions: as the model wrote them.
        references: at least one human caption per image, as they are in the annotations.
        java_scores: which of METEOR and SPICE to compute; None means those that this machine can. One that
            fails is left out with a warning.

    Returns:
        `Bleu_1` to `Bleu_4`, `METEOR`, `ROUGE_L`, `CIDEr`, `SPICE`; nothing where there are no captions.

    Raises:
        DataError: a caption without references.
    """
    if not captions:
        return {}
    for i, group in enumerate(references):
        if not group:
            raise DataError(f"caption {i} has no reference to compare it with; leave it out")
    wanted = set(JAVA_SCORES) - set(unavailable()) if java_scores is None else set(java_scores)
    candidates, flat = _tokenize(captions, [text for group in references for text in group])
    following = iter(flat)
    groups = [[next(following) for _ in group] for group in references]
    counts = NgramCounts(candidates, groups)
    found = dict(zip(BLEU, counts.bleu(), strict=True))
    found["ROUGE_L"] = sum(rouge_l(c, g) for c, g in zip(candidates, groups, strict=True)) / len(captions)
    found["CIDEr"] = float(counts.cider().mean())
    for name, score in (("METEOR", java.meteor), ("SPICE", java.spice)):
        if name in wanted:
            try:
                found[name] = score(candidates, groups)
            except java.JavaError as error:
                log.warning("%s is left out: %s", name, error)
    return {name: found[name] for name in score_names() if name in found}


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption: F-score of the longest common subsequence, best precision with best recall.

    Args:
        candidate: tokens with blanks between them; an empty text counts as one token, as in pycocoevalcap.
        references: the same, at least one.
    """
    words = candidate.split(" ")
    places: dict[str, int] = {}
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = _common_subsequence(places, len(words), others)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(others))
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(places: dict[str, int], length: int, others: Sequence[str]) -> int:
    """Length of the longest common subsequence; a row of its table is the bits of one number (Hyyro, 2004).

    Args:
        places: word -> bits of its places in the first text.
        length: words of the first text.
        others: words of the second text.
    """
    full = (1 << length) - 1
    row = full
    for word in others:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return length - row.bit_count()


def _tokenize(*corpora: Sequence[str]) -> list[list[str]]:
    """Each corpus as pycocoevalcap tokenises it: by its own tokenizer where that runs, else by `ptb`."""
    if java.problem(java.TOKENIZER_JAR) is None:
        try:
            lines = java.tokenize([[ptb.one_line(text) for text in texts] for texts in corpora])
            return [[ptb.without_punctuation(line) for line in some] for some in lines]
        except java.JavaError as error:
            log.warning("captions are tokenised without Java: %s", error)
    return [ptb.tokenize(texts) for texts in corpora]
