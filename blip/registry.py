"""Registries of classes: models, tasks and processors. Names only: no paths, counters or configuration."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from blip.errors import ConfigError, hint

T = TypeVar("T")

PLUGIN_GROUP = "blip.plugins"
_plugins_loaded = False


def load_plugins() -> None:
    """Import what other packages offer under the `blip.plugins` entry-point group, once."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in entry_points(group=PLUGIN_GROUP):
            point.load()


class Registry(Generic[T]):
    """Names for classes of one kind.

    At the first look-up the modules of `package` are imported, so that a new file in that folder is
    enough to add a name. Outside code registers by being imported (`--import`, `blip.plugins`).

    Args:
        kind: what is registered, as error messages call it.
        package: dotted name of the folder whose modules register themselves.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, type[T]] = {}
        self._searched = False

    def register(self, *names: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that makes the class known under `names`.

        Raises:
            ConfigError: a name is already taken by another class.
        """

        def add(cls: type[T]) -> type[T]:
            for name in names:
                known = self._classes.get(name)
                same = known is not None and (known.__module__, known.__qualname__) == (
                    cls.__module__,
                    cls.__qualname__,
                )
                if known is not None and not same:
                    raise ConfigError(
                        f"{self.kind} name {name!r} is already registered by"
                        f" {known.__module__}.{known.__qualname__}; choose another name for"
                        f" {cls.__module__}.{cls.__qualname__}"
                    )
                self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class registered as `name`.

        Raises:
            ConfigError: unknown name; the message has the nearest one.
        """
        self._search()
        if name not in self._classes:
            raise ConfigError(f"unknown {self.kind} {name!r}{hint(name, self._classes)}")
        return self._classes[name]

    def names(self, pattern: str = "*") -> list[str]:
        """All registered names that match the shell-style `pattern`, sorted."""
        self._search()
        return sorted(fnmatch.filter(self._classes, pattern))

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._classes

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True
        folder = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(folder.__path__):
            if not module.name.startswith("__"):
                importlib.import_module(f"{self.package}.{module.name}")
        load_plugins()


MODELS: Registry = Registry("model", "blip.models")
TASKS: Registry = Registry("task", "blip.tasks")
PROCESSORS: Registry = Registry("processor", "blip.processors")
