"""Values of configurations that came from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from blip.errors import CheckpointError
from blip.stored.files import shown

MOST_VALUES = 50_000
DEEPEST = 20
MOST_TEXT = 2000
MOST_NUMBER = 1 << 31
MOST_PARTS = 1000
"""Of what is built one by one: layers, ranks of additions, experts."""
MOST_LABELS = 100_000
"""transformers makes a name for each."""
_PARTS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|experts|r)$")


def check_values(tree: Any, where: str) -> None:
    """Raise CheckpointError for values that nobody's model has, and that would keep the machine busy.

    Args:
        tree: of a configuration, as JSON or YAML has it.
        where: what messages call it.
    """
    left = MOST_VALUES
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > DEEPEST:
            raise CheckpointError(f"{where} has more values, or deeper ones, than a configuration has")
        if isinstance(value, Mapping):
            waiting += [(str(name), below, depth + 1) for name, below in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, below, depth + 1) for below in value]
        if wrong := _wrong(key, value):
            raise CheckpointError(f"{where}: {shown(key)} {wrong}; it is damaged, or no configuration")


def _wrong(key: str, value: Any) -> str:
    """What is wrong with a single value; empty if nothing is."""
    if len(key) > MOST_TEXT or (isinstance(value, str) and len(value) > MOST_TEXT):
        return f"is text of more than {MOST_TEXT} letters"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}"
    most = MOST_PARTS if _PARTS.search(key) else MOST_LABELS if key.endswith("_labels") else MOST_NUMBER
    return f"is beyond {most}" if abs(value) > most else ""
