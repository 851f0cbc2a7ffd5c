"""Typed sections from values that Python code or a weight file brings, checked as those of a recipe are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from blip.config.files import Recipe, parse_overrides
from blip.config.load import _Loader, keys_of, report
from blip.config.values import Values
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


def model_overrides(overrides: Iterable[str], taken: Collection[str] = ()) -> dict[str, Any]:
    """`vit.depth=4` or `model.vit.depth=4` of a command line as nested dictionaries.

    Args:
        overrides: as of `parse_overrides`; a later one wins, sections are laid over each other.
        taken: keys that the command has arguments of its own for.

    Raises:
        ConfigError: no override, or a key that is taken.
    """
    values = Values()
    for path, value in parse_overrides(overrides):
        inner = path[1:] if path[0] == "model" and len(path) > 1 else path
        if inner[0] in taken:
            raise ConfigError(
                f"command line: {inner[0]!r} is no key to override here; the command has an argument for it"
                " (--help)"
            )
        values.put(inner, value, "command line")
    return values.tree()
