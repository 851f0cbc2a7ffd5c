"""Start a Q-Former from any BERT-like model: its embeddings, self-attention, feed-forwards and LM head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blip.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from blip.layers.text import LMHead
    from blip.models.qformer import QFormer

_LAYER = {
    "attention.self.query": "self_attn.query",
    "attention.self.key": "self_attn.key",
    "attention.self.value": "self_attn.value",
    "attention.output.dense": "self_attn.out",
    "attention.output.LayerNorm": "self_attn.norm",
    "intermediate.dense": "text_ffn.expand",
    "output.dense": "text_ffn.contract",
    "output.LayerNorm": "text_ffn.norm",
}


def load_bert(qformer: QFormer, lm_head: LMHead, source: str) -> str:
    """Copy a BERT's weights into the text side, then into the queries' feed-forwards.

    Cross-attention stays random. Word embeddings may have fewer rows than ours (added tokens stay random).

    Args:
        qformer: with text.
        lm_head: filled where the source has a masked-language-model head.
        source: folder or Hugging Face name of a BERT-like masked or plain model.

    Returns:
        One line of report.

    Raises:
        ConfigError: no such model.
        CheckpointError: a layer of the source does not fit.
    """
    tensors = _bert_tensors(source)
    for i, layer in enumerate(qformer.blocks()):
        for theirs, ours in _LAYER.items():
            _copy(tensors, f"encoder.layer.{i}.{theirs}", layer.get_submodule(ours), source)
    embedding = qformer.embedding
    _copy_rows(tensors, "embeddings.word_embeddings.weight", embedding.word.weight, source)
    _copy_rows(tensors, "embeddings.position_embeddings.weight", embedding.position.weight, source)
    _copy(tensors, "embeddings.LayerNorm", embedding.norm, source)
    qformer.copy_text_ffn()
    head = "cls.predictions.transform"
    if f"{head}.dense.weight" in tensors:
        _copy(tensors, f"{head}.dense", lm_head.transform, source)
        _copy(tensors, f"{head}.LayerNorm", lm_head.norm, source)
        _copy_rows(tensors, "cls.predictions.bias", lm_head.bias, source)
    return f"qformer: {len(qformer.layers)} layers from {source}; cross-attention and queries start random"


def _bert_tensors(source: str) -> dict[str, Tensor]:
    from transformers import AutoModelForMaskedLM

    try:
        model: Any = AutoModelForMaskedLM.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.qformer.init_from: no BERT-like model {source!r} on disk, in the Hugging Face cache or on"
            f" its hub ({type(error).__name__}); give a folder with its config.json and weights, or null to"
            " start at random"
        ) from error
    return {name.removeprefix("bert."): tensor for name, tensor in model.state_dict().items()}


def _copy(tensors: dict[str, Tensor], name: str, target: nn.Module, source: str) -> None:
    for part in ("weight", "bias"):
        _copy_rows(tensors, f"{name}.{part}", getattr(target, part), source, exact=True)


def _copy_rows(
    tensors: dict[str, Tensor], name: str, target: Tensor, source: str, exact: bool = False
) -> None:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"model.qformer.init_from: {source!r} has no tensor {name!r}; is it BERT-like?")
    if tensor.shape[1:] != target.shape[1:] or (exact and len(tensor) != len(target)):
        raise CheckpointError(
            f"model.qformer.init_from: {name!r} of {source!r} has shape {tuple(tensor.shape)}, the Q-Former"
            f" needs {tuple(target.shape)}; set model.qformer's sizes to the source's"
        )
    rows = min(len(tensor), len(target))
    with torch.no_grad():
        target[:rows] = tensor[:rows]
