"""Weights of any known layout (ours, LAVIS's, Hugging Face's) into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from blip.formats import hf, lavis
from blip.weights import LoadReport, load_into, read_weights


def load_any(model: Any, source: str | Path) -> LoadReport:
    """Load a weight file or folder into a model, whose layout the names tell.

    Parts that checkpoints leave out (`model.frozen_parts`) may be absent; they keep what they have.

    Args:
        model: `BlipModel`.
        source: as `read_weights` takes it.

    Raises:
        CheckpointError: it cannot be read, or a name is missing, unexpected or of another shape.
    """
    tensors = in_our_layout(read_weights(source), model.config)
    absent = [prefix + "*" for prefix in model.frozen_parts()]
    return load_into(model, tensors, source=f"'{source}'", allow_missing=absent)


def in_our_layout(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors under our names.

    Args:
        tensors: by the names of any known layout.
        config: of the model they are for: `arch`, and `vit_model` where it has a tower.

    Raises:
        CheckpointError: names of a known layout that the model has no place for.
    """
    if lavis.looks_like(tensors):
        return lavis.table(config.arch, getattr(config, "vit_model", "")).to_ours(tensors).state
    if hf.looks_like(tensors):
        return hf.table(config.arch).to_ours(tensors).state
    return tensors
