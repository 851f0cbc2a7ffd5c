"""Sizes of the text transformers, and how they start from any BERT-like model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blip.config.schema import Section
from blip.errors import CheckpointError, ConfigError
from blip.layers.attention import Attention
from blip.layers.text import FeedForward, LMHead, TextEmbedding
from blip.places import find_file

_ATTENTION = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm",
}
_FEED_FORWARD = {
    "intermediate.dense": "expand",
    "output.dense": "contract",
    "output.LayerNorm": "norm",
}


@dataclass
class BertConfig(Section):
    """Sizes of a text transformer; the defaults are BERT-base's."""

    width: int = 768
    """D of the states."""
    depth: int = 12
    """Number of layers."""
    num_heads: int = 12
    """Attention heads; must divide the width."""
    mlp_dim: int = 3072
    """Inner width of the feed-forwards."""
    max_positions: int = 512
    """Longest text that has position embeddings, in tokens."""
    norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of initial matrices; narrow models learn faster with more, some width^-0.5."""
    init_from: str | None = None
    """BERT-like model to start from: a folder (as given, else below the data root) or a Hugging Face name;
    null = random."""

    def problems(self) -> list[str]:
        """Sizes that cannot be built."""
        found = self._at_least(1, "width", "depth", "num_heads", "mlp_dim", "max_positions")
        if self.norm_eps <= 0:
            found.append(f"norm_eps: {self.norm_eps} is not above 0")
        if self.init_std <= 0:
            found.append(f"init_std: {self.init_std} is not above 0")
        if not found and self.width % self.num_heads:
            found.append(
                f"num_heads: {self.num_heads} does not divide the width {self.width}; set num_heads or width"
            )
        return found


class BertParts(NamedTuple):
    """What a BERT can start: one text transformer without cross-attention."""

    section: str
    """Its section of the configuration, such as `model.qformer`."""
    embedding: TextEmbedding
    layers: Sequence[tuple[Attention, FeedForward]]
    """Self-attention and feed-forward of each layer."""


def load_bert(
    parts: BertParts, lm_head: LMHead | None, source: str, data_root: str | Path | None = None
) -> str:
    """Copy a BERT's weights into a text transformer.

    Word embeddings may have fewer rows than ours (added tokens stay random).

    Args:
        parts: what is filled; the rest of the transformer stays as it is.
        lm_head: filled where the source has a masked-language-model head.
        source: folder (as given, else below the data root) or Hugging Face name of a BERT-like masked or
            plain model.
        data_root: None: the environment variable BLIP_DATA, else `data`.

    Returns:
        One line of report.

    Raises:
        ConfigError: no such model.
        CheckpointError: a layer of the source does not fit.
    """
    source = str(find_file(source, data_root) or source)
    copy = _Copy(_bert_tensors(parts.section, source), parts.section, source)
    for i, (attention, feed_forward) in enumerate(parts.layers):
        for theirs, ours in _ATTENTION.items():
            copy.module(f"encoder.layer.{i}.{theirs}", attention.get_submodule(ours))
        for theirs, ours in _FEED_FORWARD.items():
            copy.module(f"encoder.layer.{i}.{theirs}", feed_forward.get_submodule(ours))
    embedding = parts.embedding
    copy.rows("embeddings.word_embeddings.weight", embedding.word.weight)
    copy.rows("embeddings.position_embeddings.weight", embedding.position.weight)
    copy.module("embeddings.LayerNorm", embedding.norm)
    head = "cls.predictions.transform"
    if lm_head is not None and f"{head}.dense.weight" in copy.tensors:
        copy.module(f"{head}.dense", lm_head.transform)
        copy.module(f"{head}.LayerNorm", lm_head.norm)
        copy.rows("cls.predictions.bias", lm_head.bias)
    name = parts.section.removeprefix("model.")
    return f"{name}: {len(parts.layers)} layers from {source}; what BERT has not starts random"


def _bert_tensors(section: str, source: str) -> dict[str, Tensor]:
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging as chatter

    before = chatter.get_verbosity()
    chatter.set_verbosity_error()  # it reports what nobody wants; what is wanted is checked
    try:
        with torch.random.fork_rng(devices=[]):  # what it makes up draws no number of ours
            found: Any = AutoModelForMaskedLM.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{section}.init_from: no BERT-like model {source!r} on disk, in the Hugging Face cache or on"
            f" its hub ({type(error).__name__}); give a folder with its config.json and weights, or null to"
            " start at random"
        ) from error
    finally:
        chatter.set_verbosity(before)
    model, info = found
    made_up = set(info["missing_keys"])  # a sentence encoder has no language-model head
    return {n.removeprefix("bert."): t for n, t in model.state_dict().items() if n not in made_up}


class _Copy(NamedTuple):
    """Copies tensors by their names, or says which one does not fit."""

    tensors: dict[str, Tensor]
    section: str
    source: str

    def module(self, name: str, target: nn.Module) -> None:
        """Weight and bias, whole."""
        for part in ("weight", "bias"):
            self.rows(f"{name}.{part}", getattr(target, part), exact=True)

    def rows(self, name: str, target: Tensor, exact: bool = False) -> None:
        """The first rows that both have."""
        tensor, key = self.tensors.get(name), f"{self.section}.init_from"
        if tensor is None:
            raise CheckpointError(f"{key}: {self.source!r} has no tensor {name!r}; is it BERT-like?")
        if tensor.shape[1:] != target.shape[1:] or (exact and len(tensor) != len(target)):
            raise CheckpointError(
                f"{key}: {name!r} of {self.source!r} has shape {tuple(tensor.shape)}, this model needs"
                f" {tuple(target.shape)}; set {self.section}'s sizes to the source's"
            )
        rows = min(len(tensor), len(target))
        with torch.no_grad():
            target[:rows] = tensor[:rows]
