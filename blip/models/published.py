"""What is known of the official weights (`zoo.yaml`): where they live, what they expect, what they reach."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from blip.config.files import read_yaml
from blip.errors import ConfigError, hint
from blip.registry import MODELS

TABLE = "zoo.yaml"


class Score(NamedTuple):
    """A published result."""

    dataset: str
    metric: str
    value: float
    source: str
    """A paper's table (P1: BLIP, P2: BLIP-2, P3: InstructBLIP), or LAVIS's documentation."""


@dataclass(frozen=True)
class Entry:
    """One model of the zoo. Nothing here is fetched."""

    arch: str
    model_type: str
    weights: str | None = None
    """Address of the weights, in LAVIS's layout; None: none are published."""
    hub_id: str | None = None
    """Repository of transformers' conversion on the Hugging Face hub."""
    hub_of: str | None = None
    """File that the conversion was made of, where it is not that of `weights`."""
    starts_from: str | None = None
    """Address of what training starts from; None: it starts from parts, or from nothing."""
    image_size: int | None = None
    """Side of the pictures, in pixels."""
    processors: dict[str, Any] = field(default_factory=dict)
    """`vis_processor` and `text_processor`, each for `train` and `eval`."""
    score: tuple[Score, ...] = ()
    """What is published for these weights, or for the model that they are of."""

    @property
    def file(self) -> str | None:
        """Name of the weight file."""
        return self.weights.rpartition("/")[2] if self.weights else None


class ModelZoo:
    """The models and their types, as LAVIS's `model_zoo`, and what is known of their weights.

    `print` shows them, `len` counts pairs of both, iteration gives (architecture, list of types), and
    `model_zoo["blip2_opt", "pretrain_opt2.7b"]` is an `Entry`.
    """

    def get(self, arch: str, model_type: str | None = None) -> Entry:
        """What is known of a model.

        Args:
            arch: registry name.
            model_type: preset; None: the first one.

        Raises:
            ConfigError: unknown name or type.
        """
        cls = MODELS.get(arch)
        model_type = model_type or next(iter(cls.presets), "")
        if model_type not in cls.presets:
            raise ConfigError(f"{arch} has no model type {model_type!r}{hint(model_type, cls.presets)}")
        if (found := _entries(arch).get(model_type)) is not None:
            return found
        size = cls.presets[model_type].get("image_size", getattr(cls.config_class, "image_size", None))
        weights, start = cls.published.get(model_type), cls.starts.get(model_type)
        processors = deepcopy(cls.default_processors)
        return Entry(arch, model_type, weights, None, None, start, size, processors)

    def __getitem__(self, key: tuple[str, str]) -> Entry:
        return self.get(*key)

    def __contains__(self, key: object) -> bool:
        arch, model_type = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        return arch in MODELS and (model_type is None or model_type in MODELS.get(str(arch)).presets)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return ((name, list(MODELS.get(name).presets)) for name in MODELS.names())

    def __len__(self) -> int:
        return sum(len(types) for _, types in self)

    def __str__(self) -> str:
        line = "=" * 50
        rows = [f"{name:<30} {', '.join(types)}" for name, types in self]
        return "\n".join([line, f"{'Architectures':<30} Types", line, *rows])


model_zoo = ModelZoo()


def weights_of(arch: str) -> dict[str, str]:
    """Model type -> address of its weights, where there are some."""
    return {name: entry.weights for name, entry in _entries(arch).items() if entry.weights}


def starts_of(arch: str) -> dict[str, str]:
    """Model type -> address of what training starts from, where it starts from something."""
    return {name: entry.starts_from for name, entry in _entries(arch).items() if entry.starts_from}


def published_towers() -> dict[str, str]:
    """File name of a tower that presets name -> its address."""
    return {name: _table()["base"] + file for name, file in _table()["towers"].items()}


def _entries(arch: str) -> dict[str, Entry]:
    """Model type -> entry of the table; empty for an architecture that it lacks."""
    return {name: _entry(arch, name, row) for name, row in _table()["models"].get(arch, {}).items()}


def _entry(arch: str, model_type: str, row: dict[str, Any]) -> Entry:
    base = _table()["base"]
    addresses = {key: base + row[key] for key in ("weights", "starts_from") if key in row}
    score = dict(row.get("score", {}))
    source = score.pop("source", "")
    return Entry(
        arch,
        model_type,
        addresses.get("weights"),
        row.get("hub"),
        row.get("hub_of"),
        addresses.get("starts_from"),
        row["image_size"],
        deepcopy(_table()["processors"][row["processors"]]),
        tuple(Score(data, metric, v, source) for data, found in score.items() for metric, v in found.items()),
    )


@cache
def _table() -> dict[str, Any]:
    return read_yaml(Path(str(resources.files("blip") / "models" / TABLE)), TABLE)
