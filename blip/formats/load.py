"""Weights of any known layout (ours, LAVIS's, Hugging Face's) into a model that is there already."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip.errors import CheckpointError
from blip.formats.source import Recognised, frozen_elsewhere, left_out, local_copy, recognise
from blip.weights import load_into, matches, read_weights, some

log = logging.getLogger(__name__)

FROZEN_KEYS = {"vision.": "vit_init_from", "llm.model.": "llm_model"}
"""Parts that weight files may leave out -> the key that says where they come from."""


def load_any(model: Any, source: str | Path, data_root: str | Path | None = None) -> list[str]:
    """Load weights, whose names tell the layout, into a model; returns a line of report per part.

    They may be of another model of the family: what has no place is left out, what they lack keeps the values
    it starts with, both with a line of report. Frozen parts that the weights leave out are loaded from where
    the model's configuration says.

    Args:
        model: `BlipModel`.
        source: weight file, run folder, checkpoint, Hugging Face folder or hub id.
        data_root: where files that the configuration names may lie.

    Raises:
        CheckpointError: it cannot be read, or a name is missing, unexpected or of another shape.
    """
    name, place = f"'{source}'", local_copy(source, data_root)
    weights = recognise(read_weights(place), model.config.arch or None, name)
    lines, present = [], []
    for prefix in left_out(weights.tensors, model.freezable):
        if found := model.load_frozen([prefix], data_root):
            lines += found
            present.append(prefix)
    try:
        return [*lines, *fill(model, weights, name, present)]
    except CheckpointError as error:
        elsewhere = {p: key for p, key in FROZEN_KEYS.items() if p not in present and p in model.freezable}
        for prefix, origin in frozen_elsewhere(place).items():
            if prefix in elsewhere:
                raise CheckpointError(
                    f"{name} leaves out {prefix.rstrip('.')}, which was frozen and came from {origin!r}; set"
                    f" model.{elsewhere[prefix]} to that here, too"
                ) from error
        raise


def fill(model: Any, weights: Recognised, name: str, present: list[str]) -> list[str]:
    """Weights into a model that adopts them; returns lines of report.

    Args:
        model: `BlipModel`.
        weights: under our names, of the model or a relative.
        name: what messages call them.
        present: prefixes of parts that the model has already.

    Raises:
        CheckpointError: a name is missing, unexpected or of another shape.
    """
    tensors, without_place, kept = model.adopt(dict(weights.tensors))
    lacking = [*weights.absent, *kept, *(f"{prefix}*" for prefix in (*present, *model.replaceable))]
    report = load_into(model, tensors, source=name, allow_missing=lacking)
    elsewhere = [n for n in report.missing if n.startswith(tuple(present))]
    report.missing = [n for n in report.missing if n not in set(elsewhere)]
    lines = [report.text()]
    if elsewhere:
        lines.append(f"not in {name}, but read from where they came from: {_by_part(elsewhere)}")
    if report.nan:
        log.warning(
            "%s: %s hold values that are no numbers; it is damaged, or diverged", name, some(report.nan)
        )
    for reason in dict.fromkeys(without_place.values()):
        names = [n for n, why in without_place.items() if why == reason]
        lines.append(f"left out of {name}: {_by_part(names)} ({reason})")
    made = [n for n in report.missing if n.startswith(tuple(model.replaceable))]
    lines += model.replace(made) if made else []
    stay = [n for n in report.missing if n not in made and matches(n, [*weights.absent, *kept])]
    model.unknown = [n for n in stay if matches(n, kept)]
    if stay:
        model.begin_anew(stay)
        log.warning("%s has no %s, which keep the values they start with", name, _by_part(stay))
    return lines


def _by_part(names: Iterable[str]) -> str:
    """How many tensors of each part: `itm_head.* (2), temp`."""
    counts = Counter(name.partition(".")[0] + (".*" if "." in name else "") for name in names)
    return ", ".join(f"{part} ({count})" if part.endswith("*") else part for part, count in counts.items())
