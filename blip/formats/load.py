"""Weights of any known layout (ours, LAVIS's, Hugging Face's) into a model that is there already."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from blip.formats.source import left_out, local_copy, recognise
from blip.weights import load_into, matches, read_weights, some

log = logging.getLogger(__name__)


def load_any(model: Any, source: str | Path, data_root: str | Path | None = None) -> list[str]:
    """Load weights, whose names tell the layout, into a model; returns a line of report per part.

    Frozen parts that the weights leave out are loaded from where the model's configuration says. What the
    layout has no place for (Hugging Face: LM head, temperature) keeps its values, with a warning.

    Args:
        model: `BlipModel`.
        source: weight file, run folder, checkpoint, Hugging Face folder or hub id.
        data_root: where files that the configuration names may lie.

    Raises:
        CheckpointError: it cannot be read, or a name is missing, unexpected or of another shape.
    """
    name = f"'{source}'"
    weights = recognise(read_weights(local_copy(source)), model.config.arch or None, name)
    absent = left_out(weights.tensors, model.freezable)
    lines = model.load_frozen(absent, data_root) if absent else []
    present = [prefix + "*" for prefix in absent if prefix in model.frozen_parts()]
    report = load_into(model, weights.tensors, source=name, allow_missing=[*present, *weights.absent])
    if kept := [n for n in report.missing if matches(n, weights.absent)]:
        log.warning("%s has no %s, which keep the values they start with", name, some(kept))
    return [*lines, report.text()]
