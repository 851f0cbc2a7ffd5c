"""The tables for models with a language model: BLIP-2's stage 2 and InstructBLIP, LAVIS's and Hugging Face's.

The language model keeps its own names on all sides; only what stands before them differs. LAVIS's files
mostly lack it, as they lack a frozen tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blip.formats import bert
from blip.formats.rules import Drop, Rename, Rule, State, expand

OURS = "llm.model"
_LAYER = "Qformer.bert.encoder.layer.{i}"
_EMBEDDINGS = "Qformer.bert.embeddings"
_NUMBERS = "the numbers 0, 1, 2, ..."
_WAVES = "the frequencies of rotary positions, which follow from the sizes"


def language_model(theirs: str) -> list[Rule]:
    """The language model, if it is there; `theirs` is what they call it."""
    return [
        Drop(f"{theirs}.model.layers.{{i}}.self_attn.rotary_emb.inv_freq", _WAVES),
        Rename(f"{theirs}.{{rest}}", f"{OURS}.{{rest}}"),
    ]


def lavis(llm: str) -> list[Rule]:
    """All but the tower, in LAVIS's names.

    Args:
        llm: what the language model is called there: opt, t5 or llm.
    """
    *embeddings, _ = bert.embeddings(_EMBEDDINGS, "qformer.embedding")
    heads = {"ln_vision": "ln_vision", f"{llm}_proj": "llm_proj"}
    return [
        Rename("query_tokens", "qformer.query_tokens"),
        *embeddings,
        Drop(f"{_EMBEDDINGS}.position_ids", _NUMBERS, _position_numbers),
        *bert.layers(_LAYER, "qformer.layers.{i}", ["self_attn", "cross_attn"]),
        *bert.feed_forward(_LAYER, "qformer.layers.{i}.text_ffn"),
        *bert.feed_forward(_LAYER, "qformer.layers.{i}.query_ffn", "_query"),
        *_parts(heads),
        *language_model(f"{llm}_model"),
    ]


def _position_numbers(state: State) -> Tensor | None:
    """LAVIS keeps the numbers of positions also where it has no positions."""
    positions, numbers = f"{_EMBEDDINGS}.position_embeddings.weight", f"{_EMBEDDINGS}.position_ids"
    count = len(state[positions]) if positions in state else state[numbers].numel() if numbers in state else 0
    return torch.arange(count)[None] if count else None


def _parts(names: Mapping[str, str]) -> list[Rule]:
    """Weight and bias of modules, by their names and ours."""
    return expand([Rename(f"{a}.{{part}}", f"{b}.{{part}}") for a, b in names.items()], part=bert.PARTS)


def hf(layers: Sequence[Rule], reads_text: bool) -> list[Rule]:
    """All but the tower, in Hugging Face's names.

    Args:
        layers: of their Q-Former.
        reads_text: its Q-Former reads the instruction (InstructBLIP).
    """
    norm = "qformer.embeddings.layernorm" if reads_text else "qformer.layernorm"
    names = {norm: "qformer.embedding.norm", "language_projection": "llm_proj"}
    rules: list[Rule] = [
        Rename("query_tokens", "qformer.query_tokens"),
        *layers,
        *_parts(names),
        *language_model("language_model"),
    ]
    if reads_text:
        rules += [
            Rename("qformer.embeddings.word_embeddings.weight", "qformer.embedding.word.weight"),
            Rename("qformer.embeddings.position_embeddings.weight", "qformer.embedding.position.weight"),
            Drop("qformer.embeddings.position_ids", _NUMBERS),
        ]
    return rules
