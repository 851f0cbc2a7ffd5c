"""The tables for Hugging Face's weights of the BLIP family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blip.errors import CheckpointError, hint
from blip.formats import bert, lavis_blip, stage2
from blip.formats.rules import Omit, Rename, Rule, Table, Transform, expand


def _split_bias(fused: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = fused.chunk(3)
    if not key.is_meta and key.any():
        raise ValueError(
            "the bias of the keys is not zero, and EVA's tower has none; it was trained, which changes"
            " nothing in the attention, so set that third of it to zero"
        )
    return query, value


def _join_bias(query: Tensor, value: Tensor) -> tuple[Tensor]:
    return (torch.cat([query, torch.zeros_like(query), value]),)


def _tower(last_norm: str) -> list[Rule]:
    """A tower but for the biases of its attentions; `last_norm` is what ours calls the norm behind it."""
    theirs, ours = "vision_model.encoder.layers.{i}", "vision.vit.blocks.{i}"
    names = {
        "vision_model.embeddings.class_embedding": "vision.vit.cls_token",
        "vision_model.embeddings.position_embedding": "vision.vit.pos_embed",
        "vision_model.embeddings.patch_embedding.{part}": "vision.vit.patch_embed.proj.{part}",
        f"{theirs}.layer_norm1.{{part}}": f"{ours}.norm1.{{part}}",
        f"{theirs}.layer_norm2.{{part}}": f"{ours}.norm2.{{part}}",
        f"{theirs}.self_attn.qkv.weight": f"{ours}.attn.qkv.weight",
        f"{theirs}.self_attn.projection.{{part}}": f"{ours}.attn.proj.{{part}}",
        f"{theirs}.mlp.fc1.{{part}}": f"{ours}.mlp.fc1.{{part}}",
        f"{theirs}.mlp.fc2.{{part}}": f"{ours}.mlp.fc2.{{part}}",
        "vision_model.post_layernorm.{part}": f"{last_norm}.{{part}}",
    }
    return [Rename(a, b) for a, b in names.items()]


_QKV_BIAS = ("vision_model.encoder.layers.{i}.self_attn.qkv.bias", "vision.vit.blocks.{i}.attn.qkv.bias")


def _eva_tower() -> list[Rule]:
    """EVA's tower; `ln_vision` is the tower's last norm here."""
    ours = "vision.vit.blocks.{i}.attn"
    biases = (f"{ours}.q_bias", f"{ours}.v_bias")
    return [*_tower("ln_vision"), Transform(_QKV_BIAS[:1], biases, _split_bias, _join_bias)]


def _blip_tower() -> list[Rule]:
    return expand([*_tower("vision.vit.norm"), Rename(*_QKV_BIAS)], part=bert.PARTS)


def _qformer_layers() -> list[Rule]:
    """Theirs have no `self.` between an attention and its queries, keys and values."""
    theirs, ours = "qformer.encoder.layer.{i}", "qformer.layers.{i}"
    names: dict[str, str] = {}
    for kind, own in (("attention", "self_attn"), ("crossattention", "cross_attn")):
        names |= {f"{kind}.attention.{part}": f"{own}.{part}" for part in ("query", "key", "value")}
        names |= {f"{kind}.output.dense": f"{own}.out", f"{kind}.output.LayerNorm": f"{own}.norm"}
    return [
        *(Rename(f"{theirs}.{a}.{{part}}", f"{ours}.{b}.{{part}}") for a, b in names.items()),
        *bert.feed_forward(theirs, f"{ours}.text_ffn"),
        *bert.feed_forward(theirs, f"{ours}.query_ffn", "_query"),
    ]


def _retrieval() -> list[Rule]:
    training = "Blip2ForImageTextRetrieval has no training objective"
    rules: list[Rule] = [
        *_eva_tower(),
        Rename("query_tokens", "qformer.query_tokens"),
        Rename("embeddings.word_embeddings.weight", "qformer.embedding.word.weight"),
        Rename("embeddings.position_embeddings.weight", "qformer.embedding.position.weight"),
        Rename("qformer.layernorm.{part}", "qformer.embedding.norm.{part}"),
        *_qformer_layers(),
        Rename("vision_projection.{part}", "vision_proj.{part}"),
        Rename("text_projection.{part}", "text_proj.{part}"),
        Rename("itm_head.{part}", "itm_head.{part}"),
        Omit("temp", training),
        Omit("lm_head.bias", training),
        Omit("lm_head.transform.{part}", training),
        Omit("lm_head.norm.{part}", training),
    ]
    return expand(rules, part=bert.PARTS)


def _blip_encoder() -> list[Rule]:
    return [*_blip_tower(), *bert.text("text_encoder", "text", numbered=False)]


def _blip_decoder(ours: str) -> list[Rule]:
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    return [
        *bert.text("text_decoder.bert", ours, numbered=False),
        *bert.lm_head("text_decoder.cls.predictions", words),
    ]


def _blip_heads() -> list[Rule]:
    names = [f"{name}.{{part}}" for name in ("vision_proj", "text_proj", "itm_head")]
    return expand([Rename(name, name) for name in names], part=bert.PARTS)


def _with_llm(reads_text: bool) -> list[Rule]:
    rest = expand(_qformer_layers(), part=bert.PARTS)
    return [*expand(_eva_tower(), part=bert.PARTS), *stage2.hf(rest, reads_text)]


BLIP2_RETRIEVAL = Table("Hugging Face weights of Blip2ForImageTextRetrieval", _retrieval())
BLIP2_GENERATION = Table(
    "Hugging Face weights of Blip2ForConditionalGeneration",
    _with_llm(reads_text=False),
    needs=["language_projection.", "qformer.layernorm."],
)
INSTRUCTBLIP = Table(
    "Hugging Face weights of InstructBlipForConditionalGeneration",
    _with_llm(reads_text=True),
    needs=["language_projection.", "qformer.embeddings."],
)
BLIP_RETRIEVAL = Table(
    "Hugging Face weights of BlipForImageTextRetrieval",
    [*_blip_encoder(), *_blip_heads()],
    needs=["text_encoder.", "itm_head."],
)
_TRAINED_ONLY = "BlipForImageTextRetrieval has no training objective"
_TRAINING_STATE = [Omit(name, _TRAINED_ONLY) for name in lavis_blip.training_state()]
BLIP_TRAINED_RETRIEVAL = Table(
    "Hugging Face weights of BlipForImageTextRetrieval",
    [*BLIP_RETRIEVAL.rules, *_TRAINING_STATE],
    needs=BLIP_RETRIEVAL.needs,
)
BLIP_DUAL = Table(
    "Hugging Face weights of BlipModel",
    [
        *_blip_tower(),
        *bert.text("text_model", "text", numbered=False),
        *expand([Rename("text_model.pooler.dense.{part}", "pooler.{part}")], part=bert.PARTS),
        Rename("visual_projection.weight", "vision_proj.weight"),
        Rename("text_projection.weight", "text_proj.weight"),
        Rename("logit_scale", "logit_scale"),
    ],
    needs=["text_model.", "visual_projection."],
)
BLIP_CAPTION = Table(
    "Hugging Face weights of BlipForConditionalGeneration",
    [*_blip_tower(), *_blip_decoder("text")],
    needs=["text_decoder."],
)
BLIP_VQA = Table(
    "Hugging Face weights of BlipForQuestionAnswering",
    [*_blip_encoder(), *_blip_decoder("answer_decoder")],
    needs=["text_encoder.", "text_decoder."],
)

TABLES = {
    "blip2": BLIP2_RETRIEVAL,
    "blip2_feature_extractor": BLIP2_RETRIEVAL,
    "blip2_image_text_matching": BLIP2_RETRIEVAL,
    **dict.fromkeys(("blip2_opt", "blip2_t5", "blip2_llm"), BLIP2_GENERATION),
    **dict.fromkeys(("blip2_t5_instruct", "blip2_vicuna_instruct", "blip2_llm_instruct"), INSTRUCTBLIP),
    "blip_image_text_matching": BLIP_RETRIEVAL,
    "blip_retrieval": BLIP_TRAINED_RETRIEVAL,
    "blip_caption": BLIP_CAPTION,
    "blip_vqa": BLIP_VQA,
    "blip_dual_encoder": BLIP_DUAL,
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
