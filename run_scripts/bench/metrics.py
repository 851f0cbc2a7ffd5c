"""Caption scores beside pycocoevalcap's, in one run on one machine.

    python run_scripts/bench/metrics.py                    5,000 images with five references each
    python run_scripts/bench/metrics.py --images 500       seconds

BLEU, ROUGE-L and CIDEr from captions as they are written, tokenizer included: by pycocoevalcap, whose
tokenizer takes Java; by ours where Java is there, and by ours without. They take turns, so that whatever else
the machine does falls on all; figures are medians. Scores must be equal, or the exit code is 1, and so it is
where ours are slower. METEOR and SPICE are the same Java programs in both, and are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

# A checkout is enough: the library need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from blip.metrics import java, ptb
from blip.metrics.caption import caption_scores

Corpus = tuple[list[str], list[list[str]]]
SAME = 1e-6
"""Difference of scores that is rounding."""
WORDS = """man woman dog cat street bus table pizza plate train bench field horse beach surfboard kitchen
skateboard giraffe umbrella laptop clock bicycle motorcycle airplane bird sheep elephant toilet sandwich
cake bear boat truck standing sitting riding holding eating walking playing parked large small red white
black green wooden young old two three several group people next near front top side with and of in on at
down up through along beside under"""
NAMES = "man's t-shirt half-eaten don't 2 U.S. 10:30 black-and-white St. woman's 12 p.m. $5 it's"


def corpus(images: int) -> Corpus:
    """Captions of 8 to 14 words, as frequent as in a language, and five references that share some."""
    rng = np.random.default_rng(0)
    made = [
        f"{first}{second}" for first in WORDS.split() for second in ("", "s", "like", "ward", "er", "ish")
    ]
    words = np.array(["a", "the", *WORDS.split(), *NAMES.split(), *made])
    shares = 1 / np.arange(2, len(words) + 2)

    def draw(count: int) -> list[str]:
        return rng.choice(words, count, p=shares / shares.sum()).tolist()

    def said(base: list[str]) -> str:
        other = draw(len(base))
        text = " ".join(o if rng.random() < 0.4 else b for b, o in zip(base, other, strict=True))
        return text[0].upper() + text[1:] + ["", ".", " ."][int(rng.integers(3))]

    bases = [draw(int(rng.integers(8, 15))) for _ in range(images)]
    return [said(base) for base in bases], [[said(base) for _ in range(5)] for base in bases]


def theirs(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """pycocoevalcap's scores."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        truth = PTBTokenizer().tokenize({i: [{"caption": c} for c in g] for i, g in enumerate(references)})
        told = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
        bleu = Bleu(4).compute_score(truth, told)[0]
        rouge, cider = Rouge().compute_score(truth, told)[0], Cider().compute_score(truth, told)[0]
    found = {f"Bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)}
    return found | {"ROUGE_L": float(rouge), "CIDEr": float(cider)}


def with_java(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    return caption_scores(captions, references, [])


def without_java(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Ours where there is none; what a former round has remembered of words is forgotten."""
    ptb._piece.cache_clear()
    found, java.problem = java.problem, lambda *jars: "told not to"
    try:
        return caption_scores(captions, references, [])
    finally:
        java.problem = found


def main() -> int:
    """Print a line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if (reason := java.problem(java.TOKENIZER_JAR)) is not None:
        sys.exit(f"there is nothing to compare with: {reason}")
    made = corpus(args.images)
    ways: dict[str, Callable[..., dict[str, float]]] = {
        "pycocoevalcap": theirs,
        "blip with Java": with_java,
        "blip without Java": without_java,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, dict[str, float]] = {}
    for _ in range(args.repeats):
        for name, score in ways.items():
            started = time.perf_counter()
            scores[name] = score(*made)
            seconds[name].append(time.perf_counter() - started)
    official, failed = scores["pycocoevalcap"], False
    print(" ".join(f"{name} {value:.6f}" for name, value in official.items()))
    for name in ways:
        gap = max(abs(scores[name][key] - value) for key, value in official.items())
        faster = median(a / b for a, b in zip(seconds["pycocoevalcap"], seconds[name], strict=True))
        failed |= gap > SAME or faster < 1
        print(f"{name:18} {median(seconds[name]):7.2f} s {faster:6.2f}x, largest difference {gap:.1e}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
