"""The values of a configuration in the making: later sources over earlier ones, and where each comes from."""

from __future__ import annotations

from typing import Any

Path = tuple[str, ...]


class Values:
    """Leaves of the tree by path, each with its source; a later source replaces an earlier one."""

    def __init__(self) -> None:
        self.leaves: dict[Path, Any] = {}
        self.origins: dict[Path, str] = {}

    def put(self, path: Path, value: Any, origin: str) -> None:
        """Set the value at `path`, and a section's values one by one."""
        if isinstance(value, dict) and value:
            for key, item in value.items():
                self.put((*path, key), item, origin)
            return
        below = [known for known in self.leaves if known[: len(path)] == path]
        # An empty section changes nothing, except that a dataset may be named by itself.
        if value == {} and (below or len(path) != 2 or path[0] != "datasets"):
            return
        for known in [*below, *(path[:i] for i in range(1, len(path)))]:
            self.leaves.pop(known, None)
            self.origins.pop(known, None)
        self.leaves[path] = value
        self.origins[path] = origin

    def drop(self, path: Path) -> None:
        """Forget what is at and below `path`."""
        for known in [known for known in self.leaves if known[: len(path)] == path]:
            del self.leaves[known], self.origins[known]

    def tree(self, top: Path = ()) -> dict[str, Any]:
        """The leaves below `top` as nested dictionaries."""
        root: dict[str, Any] = {}
        for path, value in self.leaves.items():
            if path[: len(top)] == top and len(path) > len(top):
                node = root
                for key in path[len(top) : -1]:
                    node = node.setdefault(key, {})
                node[path[-1]] = value
        return root

    def origin(self, path: Path) -> str:
        """The source of the value at `path`, or of the first one below it or the nearest above it."""
        for known, origin in self.origins.items():
            if known[: len(path)] == path or path[: len(known)] == known:
                return origin
        return "default"
