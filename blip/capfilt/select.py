"""Which texts are kept, and what there is to tell about all of them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blip.tasks.capfilt import KeepConfig

BINS = 50
"""Of a histogram of scores, over their whole range."""
RANGES = {"itm": (0.0, 1.0), "itc": (-1.0, 1.0)}
ORIGINS = ("web", "synthetic")

Thresholds = dict[str, dict[str, float]]
"""Origin -> score -> least value that is kept."""


def thresholds(keep: KeepConfig, lines: Iterable[Mapping[str, Any]]) -> Thresholds:
    """The least scores of web and of synthetic texts; quantiles are looked up in all of them.

    Args:
        keep: the rules.
        lines: of the journals; read only where there are quantiles.
    """
    fixed = {name: value for name in RANGES if (value := getattr(keep, name)) is not None}
    found: Thresholds = {origin: dict(fixed) for origin in ORIGINS}
    shares = {name: share for name in RANGES if (share := getattr(keep, f"{name}_quantile")) is not None}
    if not shares:
        return found
    scores = {(origin, name): array("d") for origin in ORIGINS for name in shares}
    for line in lines:
        for text in line.get("texts", ()):
            for name in shares:
                scores[text["origin"], name].append(text[name])
    for (origin, name), values in scores.items():
        if values:
            # "higher" keeps at most the share that is asked for, and never parts equal scores.
            least = float(np.quantile(np.frombuffer(values, np.float64), shares[name], method="higher"))
            found[origin][name] = max(least, found[origin].get(name, least))
    return found


def choose(line: Mapping[str, Any], keep: KeepConfig, least: Thresholds) -> list[dict[str, Any]]:
    """The texts of a picture that are kept, in their order, or the best ones first.

    Args:
        line: of the journal.
        keep: the rules.
        least: as `thresholds` finds them.
    """
    kept = [text for text in line.get("texts", ()) if fulfils(text, least)]
    if keep.best is None:
        return kept
    return sorted(kept, key=lambda text: -text[keep.best_by])[: keep.best]


def fulfils(text: Mapping[str, Any], least: Thresholds) -> bool:
    """Whether the scores of a text reach what is asked."""
    return all(text[name] >= bound for name, bound in least[text["origin"]].items())


@dataclass
class Tally:
    """Counts of texts by origin, and how their scores are spread."""

    pictures: int = 0
    """All."""
    bad: Counter[str] = field(default_factory=Counter)
    """Causes of pictures, and of shards, that cannot be read."""
    bare: int = 0
    """Pictures of which no text is kept."""
    texts: Counter[str] = field(default_factory=Counter)
    """Origin -> texts that were judged."""
    kept: Counter[str] = field(default_factory=Counter)
    """Origin -> texts that are kept."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Causes why texts were not even judged."""
    histograms: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Score -> origin -> texts per bin."""

    def add(self, line: Mapping[str, Any], kept: list[dict[str, Any]]) -> None:
        """Count a picture."""
        if "cause" in line:
            self.bad[line["cause"]] += 1
            self.pictures += not line.get("whole")
            return
        self.pictures += 1
        self.bare += not kept
        self.dropped.update(line.get("dropped", ()))
        self.kept.update(text["origin"] for text in kept)
        for text in line["texts"]:
            self.texts[text["origin"]] += 1
            for name, (low, high) in RANGES.items():
                if name in text:
                    bins = self.histograms.setdefault(name, {}).setdefault(text["origin"], [0] * BINS)
                    bins[min(int((text[name] - low) / (high - low) * BINS), BINS - 1)] += 1

    def removed(self, origin: str) -> float | None:
        """Share of the texts that was removed: the noise, as BLIP's tables 2 and 4 call it."""
        count = self.texts[origin]
        return 1 - self.kept[origin] / count if count else None

    def line(self) -> str:
        """For people."""
        parts = [
            f"{self.kept[origin]} of {count} {origin} texts kept, {self.removed(origin):.1%} removed"
            for origin in ORIGINS
            if (count := self.texts[origin])
        ]
        if self.bad:
            parts.append("unreadable: " + ", ".join(f"{n} {cause}" for cause, n in self.bad.most_common()))
        return f"{self.pictures} pictures, {self.bare} of them without any text now; " + "; ".join(parts)

    def values(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "pictures": self.pictures,
            "unreadable": dict(self.bad),
            "without_text": self.bare,
            "texts": dict(self.texts),
            "kept": dict(self.kept),
            "removed": {origin: self.removed(origin) for origin in ORIGINS if self.texts[origin]},
            "not_judged": dict(self.dropped),
            "histograms": self.histograms,
        }
