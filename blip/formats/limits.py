"""What a configuration that comes with weights may ask for: a model that can be of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from blip.errors import BlipError, CheckpointError, brief
from blip.meta import on_meta

SPARE = 1 << 27
"""Numbers that a small model may have beyond those that its weights give: queues, a twin."""
TIMES = 4
"""Times the numbers of its weights that a model may have."""

_LLM = "llm.model."


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
