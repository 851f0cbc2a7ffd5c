"""What a recipe says others have reached (`run.published`), read into rows and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from blip.errors import hint

TEXTS = ("source", "data", "model_type", "server", "note")


@dataclass(frozen=True)
class Published:
    """The published scores of one model on one split of one dataset."""

    source: str
    """Where they stand, such as "BLIP, table 7"."""
    data: str
    """DATASET/SPLIT, as in `datasets` and as the run names splits."""
    scores: dict[str, float]
    """Metric, by its name in `metrics.jsonl` -> value as papers print it: in percent, and the metrics of
    captions times 100."""
    model_type: str = ""
    """The `model.model_type` that they are of; empty: any."""
    weights: tuple[str, ...] = ()
    """File names of the weights that they are of, or that training started from; empty: those that the zoo
    has for the model type; `unreleased`: nobody can have them."""
    server: str = ""
    """The evaluation server's name of the split, where scores cannot be computed here: `test-dev`."""
    note: str = ""
    """What else was different, or is not known for sure."""

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return self.data.rpartition("/")[0]

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.data.rpartition("/")[2]


def read_published(rows: Sequence[Mapping[str, Any]]) -> list[Published]:
    """The rows of `run.published`, of which `published_problems` has found nothing."""
    return [Published(**{**row, "weights": _weights(row), "scores": dict(row["scores"])}) for row in rows]


def published_problems(rows: Sequence[Mapping[str, Any]], splits: Sequence[str]) -> list[str]:
    """What is wrong with rows as a YAML file has them, one `published.NUMBER.KEY: reason` each.

    Args:
        splits: names that there are.
    """
    found = ((number, _problems(row, splits)) for number, row in enumerate(rows))
    return [f"published.{number}{problem}" for number, problems in found for problem in problems]


def _problems(row: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    known = [field.name for field in fields(Published)]
    found = [f".{key}: no such key{hint(str(key), known)}" for key in row if key not in known]
    found += [f".{key}: missing" for key in ("source", "data", "scores") if not row.get(key)]
    found += [f".{k}: {row[k]!r} is not a text" for k in TEXTS if not isinstance(row.get(k, ""), str)]
    if not all(isinstance(name, str) for name in _weights(row)):
        found.append(".weights: not the name of a file, or a list of such names")
    data, scores = row.get("data"), row.get("scores") or {}
    if isinstance(data, str) and data:
        dataset, _, split = data.rpartition("/")
        if not dataset or split not in splits:
            found.append(f".data: {data!r} is not DATASET/SPLIT with a split of {', '.join(splits)}")
    if not isinstance(scores, Mapping):
        return [*found, ".scores: not a section of metrics and values"]
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            found.append(f".scores.{name}: {value!r} is not a number")
    return found


def _weights(row: Mapping[str, Any]) -> tuple[Any, ...]:
    given = row.get("weights") or ()
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)
