"""The tables for LAVIS's weights: how its modules call what ours call otherwise.

Where a name is the same on both sides the table says so, since a key without a rule is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blip.errors import CheckpointError, hint
from blip.formats.rules import Drop, Rename, Rule, State, Table, Transform, copy_of, expand
from blip.layers.vit import OPENAI_CLIP_NAMES

_PARTS = ("weight", "bias")
_LAYER = "Qformer.bert.encoder.layer.{i}"
_CLIP_BLOCK = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")


def _tower() -> list[Rule]:
    """EVA-CLIP's and BLIP's towers, whose names are ours."""
    names = (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.{part}",
        "blocks.{i}.norm1.{part}",
        "blocks.{i}.norm2.{part}",
        "blocks.{i}.attn.q_bias",
        "blocks.{i}.attn.v_bias",
        "blocks.{i}.attn.qkv.{part}",
        "blocks.{i}.attn.proj.{part}",
        "blocks.{i}.mlp.fc1.{part}",
        "blocks.{i}.mlp.fc2.{part}",
        "norm.{part}",
    )
    return expand([Rename(f"visual_encoder.{name}", f"vision.vit.{name}") for name in names], part=_PARTS)


def _clip_tower() -> list[Rule]:
    """CLIP's tower: OpenAI's names, [CLS] and positions without our leading dimensions."""
    names = ["conv1.weight"]
    for part in _PARTS:
        block = [f"attn.in_proj_{part}", *(f"{name}.{part}" for name in _CLIP_BLOCK)]
        names += [f"ln_pre.{part}", *(f"transformer.resblocks.{{i}}.{name}" for name in block)]
    rules: list[Rule] = [Rename(f"visual_encoder.{n}", f"vision.vit.{_from_openai(n)}") for n in names]
    name = "visual_encoder.class_embedding", "vision.vit.cls_token"
    rules.append(Transform(name[:1], name[1:], lambda t: (t[None, None],), lambda t: (t[0, 0],)))
    name = "visual_encoder.positional_embedding", "vision.vit.pos_embed"
    rules.append(Transform(name[:1], name[1:], lambda t: (t[None],), lambda t: (t[0],)))
    return rules


def _from_openai(name: str) -> str:
    for theirs, ours in OPENAI_CLIP_NAMES:
        name = name.replace(theirs, ours)
    return name


def _attention(theirs: str, ours: str) -> list[Rule]:
    names = {
        "self.query": "query",
        "self.key": "key",
        "self.value": "value",
        "output.dense": "out",
        "output.LayerNorm": "norm",
    }
    rules = [Rename(f"{theirs}.{a}.{{part}}", f"{ours}.{b}.{{part}}") for a, b in names.items()]
    return expand(rules, part=_PARTS)


def _feed_forward(theirs: str, ours: str, suffix: str) -> list[Rule]:
    names = {
        f"intermediate{suffix}.dense": "expand",
        f"output{suffix}.dense": "contract",
        f"output{suffix}.LayerNorm": "norm",
    }
    rules = [Rename(f"{theirs}.{a}.{{part}}", f"{ours}.{b}.{{part}}") for a, b in names.items()]
    return expand(rules, part=_PARTS)


def _position_ids(state: State) -> Tensor | None:
    table = state.get("Qformer.bert.embeddings.position_embeddings.weight")
    return None if table is None else torch.arange(len(table))[None]


def _qformer() -> list[Rule]:
    """Q-Former with text: layers, embeddings and the head of the language-model loss."""
    embeddings, predictions = "Qformer.bert.embeddings", "Qformer.cls.predictions"
    rules: list[Rule] = [
        Rename("query_tokens", "qformer.query_tokens"),
        Rename(f"{embeddings}.word_embeddings.weight", "qformer.embedding.word.weight"),
        Rename(f"{embeddings}.position_embeddings.weight", "qformer.embedding.position.weight"),
        Rename(f"{embeddings}.LayerNorm.{{part}}", "qformer.embedding.norm.{part}"),
        Drop(f"{embeddings}.position_ids", "the numbers 0, 1, 2, ...", _position_ids),
        Rename(f"{predictions}.bias", "lm_head.bias"),
        Rename(f"{predictions}.transform.dense.{{part}}", "lm_head.transform.{part}"),
        Rename(f"{predictions}.transform.LayerNorm.{{part}}", "lm_head.norm.{part}"),
        Drop(
            f"{predictions}.decoder.weight",
            "tied to the word embeddings",
            copy_of(f"{embeddings}.word_embeddings.weight"),
        ),
        Drop(f"{predictions}.decoder.bias", "the same as predictions.bias", copy_of(f"{predictions}.bias")),
    ]
    rules += _attention(f"{_LAYER}.attention", "qformer.layers.{i}.self_attn")
    rules += _attention(f"{_LAYER}.crossattention", "qformer.layers.{i}.cross_attn")
    rules += _feed_forward(_LAYER, "qformer.layers.{i}.text_ffn", "")
    rules += _feed_forward(_LAYER, "qformer.layers.{i}.query_ffn", "_query")
    return expand(rules, part=_PARTS)


def _heads() -> list[Rule]:
    same = ["ln_vision.{part}", "vision_proj.{part}", "text_proj.{part}", "itm_head.{part}", "temp"]
    return expand([Rename(name, name) for name in same], part=_PARTS)


def _stage1(tower: str, rules: list[Rule]) -> Table:
    return Table(f"LAVIS weights of BLIP-2 stage 1 ({tower})", [*rules, *_qformer(), *_heads()])


_STAGE1 = {"clip_L": _stage1("CLIP tower", _clip_tower()), "": _stage1("EVA or BLIP tower", _tower())}
TABLES = {
    "blip2": _STAGE1,
    "blip2_feature_extractor": _STAGE1,
    "blip2_image_text_matching": _STAGE1,
}
"""Registry name -> vision tower -> table; the tower "" stands for all that have no line of their own."""


def table(arch: str, vit_model: str = "") -> Table:
    """The table of a model by its registry name and its vision tower.

    Raises:
        CheckpointError: LAVIS has no weights for that model, or their layout is not known here.
    """
    if arch not in TABLES:
        raise CheckpointError(f"no LAVIS layout is known for {arch!r}{hint(arch, TABLES)}")
    towers = TABLES[arch]
    return towers.get(vit_model, towers[""])


def looks_like(state: Mapping[str, Any]) -> bool:
    """Whether the keys are LAVIS's: ours have no `Qformer.` and no `visual_encoder.`."""
    return any(key.startswith(("Qformer.", "visual_encoder.")) for key in state)
