"""Scores of a run beside the published ones: a table for the log, `published.json` and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from blip.config.published import Published

HEADS = ("dataset", "split", "metric", "here", "published", "difference", "source")
HUNDREDTHS = "times 100 beside metrics.jsonl, as papers print them"


@dataclass(frozen=True)
class Compared:
    """One published figure and ours, both as papers print them."""

    dataset: str
    split: str
    metric: str
    score: float | None
    """None: the run has not computed it."""
    published: float
    difference: float | None
    source: str
    scale: float
    """What the figure of `metrics.jsonl` was multiplied with."""
    notes: tuple[str, ...] = ()
    """Why the two may differ, or cannot be compared."""


@dataclass(frozen=True)
class Expected:
    """A row of published scores, with what sets this run apart from it."""

    row: Published
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What a run's last scores are held against."""

    rows: Sequence[Expected] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    """Metric -> what its figures are multiplied with to be as papers print them; others are so already."""

    def against(self, found: Mapping[str, Mapping[str, float]]) -> list[Compared]:
        """Every published figure of the splits that were evaluated.

        Args:
            found: DATASET/SPLIT -> metrics, empty where there was nothing to score.
        """
        return [
            self._compared(expected, metric, value, found[expected.row.data])
            for expected in self.rows
            if expected.row.data in found
            for metric, value in expected.row.scores.items()
        ]

    def _compared(self, expected: Expected, metric: str, value: float, own: Mapping[str, float]) -> Compared:
        row, notes = expected.row, list(expected.notes)
        scale = self.scales.get(metric, 1.0)
        score = own[metric] * scale if metric in own and not row.server else None
        if row.server:
            notes.insert(0, f"of {row.server}: the server scores the file in submissions/")
        elif score is None:
            notes.insert(0, "not computed here")
        return Compared(
            dataset=row.dataset,
            split=row.split,
            metric=metric,
            score=None if score is None else round(score, 4),
            published=float(value),
            difference=None if score is None else round(score - value, 4),
            source=row.source,
            scale=scale,
            notes=tuple(notes + ([row.note] if row.note else [])),
        )


def as_values(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """What `published.json` holds: the fields of each row."""
    return [asdict(row) | {"notes": list(row.notes)} for row in rows]


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """One row of `published.json` as the table shows it, in the order of `HEADS`."""
    score, difference = row.get("score"), row.get("difference")
    scaled = " (x100)" if row.get("scale") == 100 else ""
    return [
        *(str(row.get(key, "")) for key in ("dataset", "split")),
        f"{row.get('metric', '')}{scaled}",
        "-" if score is None else f"{score:.2f}",
        f"{row.get('published', 0.0):.2f}",
        "-" if difference is None else f"{difference:+.2f}",
        str(row.get("source", "")),
    ]


def notes_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The notes of rows, each once, with the sources that it is about unless that is all of them."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes", ()):
            about.setdefault(str(note), []).append(str(row.get("source")))
    sources = {str(row.get("source")) for row in rows}
    found = []
    for note, some in about.items():
        own = list(dict.fromkeys(some))
        found.append(note if set(own) == sources else f"{'; '.join(own)}: {note}")
    if any(row.get("scale") == 100 for row in rows):
        found.append(f"x100: {HUNDREDTHS}")
    return found


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal, with the notes below."""
    table = [list(HEADS), *(cells_of(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADS))]
    numeric = {HEADS.index(name) for name in ("here", "published", "difference")}
    lines = [
        "  ".join(
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return "\n".join([*lines, *(f"  {note}" for note in notes_of(rows))])
