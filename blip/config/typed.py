"""Typed sections from values that Python code or a weight file brings, checked as those of a recipe are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from blip.config.files import Recipe
from blip.config.load import _Loader, keys_of, report
from blip.errors import ConfigError

T = TypeVar("T")


def typed_section(
    cls: type[T], layers: Mapping[str, Mapping[str, Any]], path: tuple[str, ...] = ("model",)
) -> T:
    """A section of class `cls`; each layer of values is laid over the ones before it, key by key.

    Args:
        cls: a dataclass, nested ones included.
        layers: where values come from, as messages call it -> the values, sections as dictionaries.
        path: of the section, as messages call it.

    Raises:
        ConfigError: unknown keys, wrong types and impossible combinations, all in one message.
    """
    origin = list(layers)[-1] if layers else "default"
    loader = _Loader(Recipe(Path(origin), origin, origin), {}, None)
    for name, values in layers.items():
        loader.values.put(path, dict(values), name)
    for key, value in list(loader.values.leaves.items()):
        loader._refuse_code(key, value)
    loader.valid = list(keys_of(cls, ".".join((*path, ""))))
    built = loader.build(cls, path) if not loader.problems else None
    if built is None:
        raise ConfigError(report(origin, loader.problems))
    return built
