"""The tables for Hugging Face's weights of the BLIP family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blip.errors import CheckpointError, hint
from blip.formats.rules import Omit, Rename, Rule, Table, Transform, expand

_PARTS = ("weight", "bias")


def _split_bias(fused: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = fused.chunk(3)
    if key.any():
        raise ValueError(
            "the bias of the keys is not zero, and EVA's tower has none; it was trained, which changes"
            " nothing in the attention, so set that third of it to zero"
        )
    return query, value


def _join_bias(query: Tensor, value: Tensor) -> tuple[Tensor]:
    return (torch.cat([query, torch.zeros_like(query), value]),)


def _eva_tower() -> list[Rule]:
    """EVA's tower; `ln_vision` is the tower's last norm here."""
    theirs, ours = "vision_model.encoder.layers.{i}", "vision.vit.blocks.{i}"
    biases = (f"{ours}.attn.q_bias", f"{ours}.attn.v_bias")
    return [
        Rename("vision_model.embeddings.class_embedding", "vision.vit.cls_token"),
        Rename("vision_model.embeddings.position_embedding", "vision.vit.pos_embed"),
        Rename("vision_model.embeddings.patch_embedding.{part}", "vision.vit.patch_embed.proj.{part}"),
        Rename(f"{theirs}.layer_norm1.{{part}}", f"{ours}.norm1.{{part}}"),
        Rename(f"{theirs}.layer_norm2.{{part}}", f"{ours}.norm2.{{part}}"),
        Rename(f"{theirs}.self_attn.qkv.weight", f"{ours}.attn.qkv.weight"),
        Transform((f"{theirs}.self_attn.qkv.bias",), biases, _split_bias, _join_bias),
        Rename(f"{theirs}.self_attn.projection.{{part}}", f"{ours}.attn.proj.{{part}}"),
        Rename(f"{theirs}.mlp.fc1.{{part}}", f"{ours}.mlp.fc1.{{part}}"),
        Rename(f"{theirs}.mlp.fc2.{{part}}", f"{ours}.mlp.fc2.{{part}}"),
        Rename("vision_model.post_layernorm.{part}", "ln_vision.{part}"),
    ]


def _qformer_layer() -> list[Rule]:
    theirs, ours = "qformer.encoder.layer.{i}", "qformer.layers.{i}"
    attention = {
        "attention.query": "query",
        "attention.key": "key",
        "attention.value": "value",
        "output.dense": "out",
        "output.LayerNorm": "norm",
    }
    names: dict[str, str] = {}
    for kind, own in (("attention", "self_attn"), ("crossattention", "cross_attn")):
        names |= {f"{kind}.{a}": f"{own}.{b}" for a, b in attention.items()}
    for suffix, own in (("", "text_ffn"), ("_query", "query_ffn")):
        names |= {f"intermediate{suffix}.dense": f"{own}.expand", f"output{suffix}.dense": f"{own}.contract"}
        names |= {f"output{suffix}.LayerNorm": f"{own}.norm"}
    return [Rename(f"{theirs}.{a}.{{part}}", f"{ours}.{b}.{{part}}") for a, b in names.items()]


def _retrieval() -> list[Rule]:
    training = "Blip2ForImageTextRetrieval has no training objective"
    rules: list[Rule] = [
        *_eva_tower(),
        Rename("query_tokens", "qformer.query_tokens"),
        Rename("embeddings.word_embeddings.weight", "qformer.embedding.word.weight"),
        Rename("embeddings.position_embeddings.weight", "qformer.embedding.position.weight"),
        Rename("qformer.layernorm.{part}", "qformer.embedding.norm.{part}"),
        *_qformer_layer(),
        Rename("vision_projection.{part}", "vision_proj.{part}"),
        Rename("text_projection.{part}", "text_proj.{part}"),
        Rename("itm_head.{part}", "itm_head.{part}"),
        Omit("temp", training),
        Omit("lm_head.bias", training),
        Omit("lm_head.transform.{part}", training),
        Omit("lm_head.norm.{part}", training),
    ]
    return expand(rules, part=_PARTS)


BLIP2_RETRIEVAL = Table("Hugging Face weights of Blip2ForImageTextRetrieval", _retrieval())

TABLES = {
    "blip2": BLIP2_RETRIEVAL,
    "blip2_feature_extractor": BLIP2_RETRIEVAL,
    "blip2_image_text_matching": BLIP2_RETRIEVAL,
}


def table(arch: str) -> Table:
    """The table of a model by its registry name.

    Raises:
        CheckpointError: transformers has no such model, or its layout is not known here.
    """
    if arch not in TABLES:
        raise CheckpointError(f"no Hugging Face layout is known for {arch!r}{hint(arch, TABLES)}")
    return TABLES[arch]


def looks_like(state: Mapping[str, Any]) -> bool:
    """Whether the keys are Hugging Face's: ours have no `vision_model.`."""
    return any(key.startswith("vision_model.") for key in state)
