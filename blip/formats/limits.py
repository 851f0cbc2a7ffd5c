"""What a configuration that comes with weights may ask for: no more than they can be of."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from blip.errors import BlipError, CheckpointError, brief
from blip.meta import on_meta
from blip.stored.files import shown

MOST_VALUES = 50_000
DEEPEST = 20
MOST_TEXT = 2000
MOST_NUMBER = 1 << 31
MOST_PARTS = 1000
"""Of what is built one by one: layers, ranks of additions, experts."""
MOST_LABELS = 100_000
"""transformers makes a name for each."""
SPARE = 1 << 27
"""Numbers that a small model may have beyond those that its weights give: queues, a twin."""
TIMES = 4
"""Times the numbers of its weights that a model may have."""

_LLM = "llm.model."
_PARTS = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|experts|r)(?:_|$)")


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


def sketch(build: Callable[[], Any], name: str) -> Any:
    """A model without memory.

    Args:
        build: makes it on the default device.
        name: what messages call its weights.

    Raises:
        CheckpointError: its configuration cannot be built.
        ConfigError: the same, if the model knows why.
    """
    try:
        with on_meta():
            return build()
    except BlipError:
        raise
    except Exception as error:  # whatever modules make of sizes that do not go together
        raise CheckpointError(
            f"{name}: no model can be built of its configuration ({brief(error)}); correct its values"
        ) from error


def check_size(model: Any, stored: Mapping[str, Tensor], absent: list[str], name: str) -> None:
    """Raise CheckpointError for a model that is far larger than its weights, or than the machine.

    Args:
        model: without memory.
        stored: the weights.
        absent: prefixes of parts that they leave out.
        name: what messages call them.
    """
    there = sum(tensor.numel() for tensor in stored.values())
    state, elsewhere = model.state_dict(), tuple(absent)
    wanted = sum(t.numel() for n, t in state.items() if not n.startswith(elsewhere))
    if wanted > TIMES * there + SPARE:
        raise CheckpointError(
            f"{name}: its configuration is of a model with {wanted} numbers, but it has {there}; correct the"
            " sizes, or fetch the weights that belong to them"
        )
    # Weights that lie elsewhere cannot be counted. Language models are only built when theirs are read.
    size = sum(t.nbytes for n, t in state.items() if n.startswith(elsewhere) and not n.startswith(_LLM))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise CheckpointError(
            f"{name}: its configuration is of a model of {size / 1e9:.0f} GB, but this machine has"
            f" {memory / 1e9:.0f} GB; correct the sizes"
        )
