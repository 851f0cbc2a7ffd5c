"""Weight files of BLIP-2: the sizes that their tensors tell, and how stage 2 starts from those of stage 1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from blip.layers.vit import NAMED
from blip.models.base import Adopted, Sizes
from blip.models.llm_presets import sizes_of_llm, width_of_llm
from blip.models.qformer import QFormerConfig

# What LAVIS's BLIP-2 always starts from. Building a model reads none of it; `load_parts` does.
EVA: dict[str, Any] = {"vit_init_from": "eva_vit_g.pth"}
CLIP_L: dict[str, Any] = {"vit_model": "clip_L", "vit_init_from": "clip_vit_L.pth"}
BERT: dict[str, Any] = {"qformer": {"init_from": "bert-base-uncased"}}

TOWER = "vision.vit."
_BLIP_TOWERS = ("vit_base", "vit_large")
_BLIP2_TOWERS = ("eva_clip_g", "clip_L")


def stage1_sizes(tensors: Mapping[str, Tensor], longest: int = 32) -> Sizes:
    """What names and shapes tell of a configuration, and what they leave open.

    Numbers of heads leave no trace in the weights; they are those of the published sizes, or open.

    Args:
        tensors: by our names, with or without the tower; others make no sense and give little.
        longest: text that the model reads; where there are fewer positions, they decide.
    """
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for key, name, axis in (
        ("num_query_token", "qformer.query_tokens", 1),
        ("vocab_size", "qformer.embedding.word.weight", 0),
        ("embed_dim", "vision_proj.weight", 0),
    ):
        if name in tensors:
            values[key] = tensors[name].shape[axis]
    _qformer(tensors, values, unknown)
    positions = values.get("qformer", {}).get("max_positions", longest)
    values |= {"max_txt_len": positions} if positions < longest else {}
    _tower(tensors, values, unknown)
    return Sizes(values, unknown)


def _qformer(tensors: Mapping[str, Tensor], values: dict[str, Any], unknown: list[str]) -> None:
    layers = _numbers(tensors, r"qformer\.layers\.(\d+)\.self_attn\.query\.weight")
    if not layers or "qformer.layers.0.query_ffn.expand.weight" not in tensors:
        return
    mlp_dim, width = tensors["qformer.layers.0.query_ffn.expand.weight"].shape
    sizes = {"width": width, "depth": len(layers), "mlp_dim": mlp_dim}
    if "qformer.embedding.position.weight" in tensors:
        sizes["max_positions"] = len(tensors["qformer.embedding.position.weight"])
    values["qformer"] = sizes
    if width != QFormerConfig.width:
        unknown.append("qformer.num_heads")
    looking = _numbers(tensors, r"qformer\.layers\.(\d+)\.cross_attn\.query\.weight")
    if looking:
        values["cross_attention_freq"] = looking[1] if len(looking) > 1 else len(layers)


def _tower(tensors: Mapping[str, Tensor], values: dict[str, Any], unknown: list[str]) -> None:
    patch = tensors.get(f"{TOWER}patch_embed.proj.weight")
    if patch is None:
        norm = tensors.get("ln_vision.weight")
        fitting = [name for name in _BLIP2_TOWERS if norm is not None and len(norm) == NAMED[name].width]
        if fitting:
            values["vit_model"] = fitting[0]
        else:
            unknown.append("vit_model")
        return
    width, _, patch_size, _ = patch.shape
    named = NAMED[_tower_name(tensors, width)]
    values["vit_model"] = named.name
    expand = tensors.get(f"{TOWER}blocks.0.mlp.fc1.weight")
    sizes = {
        "patch_size": patch_size,
        "width": width,
        "depth": len(_numbers(tensors, r"vision\.vit\.blocks\.(\d+)\.norm1\.weight")),
        "mlp_dim": named.mlp_dim if expand is None else len(expand),
    }
    stem = tensors.get(f"{TOWER}patch_embed.stem.weight")
    if stem is not None:
        stride = stem.shape[-1] // 2
        sizes |= {"stem_width": len(stem), "stem_stride": stride, "patch_size": patch_size * stride}
    if different := {key: value for key, value in sizes.items() if value != getattr(named, key)}:
        values["vit"] = different
    if width != named.width:
        unknown.append("vit.heads")
    if f"{TOWER}pos_embed" in tensors:  # [CLS] and a square of patches
        values["image_size"] = isqrt(tensors[f"{TOWER}pos_embed"].shape[1] - 1) * sizes["patch_size"]


def _tower_name(tensors: Mapping[str, Tensor], width: int) -> str:
    if f"{TOWER}blocks.0.attn.q_bias" in tensors:
        return "eva_clip_g"
    if f"{TOWER}norm.weight" not in tensors:
        return "clip_L"
    return next((name for name in _BLIP_TOWERS if NAMED[name].width == width), _BLIP_TOWERS[0])


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    found = (re.fullmatch(pattern, name) for name in tensors)
    return sorted({int(match[1]) for match in found if match})


_STAGE1_ONLY = ("lm_head.", "vision_proj.", "text_proj.", "itm_head.", "temp")
_TEXT_SIDE = re.compile(r"qformer\.(embedding\.(word|position)\.|layers\.\d+\.text_ffn\.)")
NO_OBJECTIVE = "stage 1's own; a language model stands in its place"
NO_TEXT = "this Q-Former reads no text; with model.qformer_text_input it does"
OTHER_LLM = "it speaks to a language model of another width"


_WORDS = ("llm.model.shared.weight", "llm.model.model.embed_tokens.weight", ".decoder.embed_tokens.weight")
"""What the word embeddings of T5, Llama and OPT are called."""


def stage2_sizes(
    tensors: Mapping[str, Tensor], language_models: Iterable[str | None] = (), longest: int = 32
) -> Sizes:
    """What weights of stage 2 or InstructBLIP tell of a configuration.

    Args:
        tensors: by our names; of a language model that is not among them only the width shows.
        language_models: names of those that may be meant.
        longest: as of `stage1_sizes`.
    """
    values, unknown = stage1_sizes(tensors, longest)
    values.pop("embed_dim", None)
    if "llm_proj.weight" in tensors:  # else they are of stage 1, whose text side may be left out
        values["qformer_text_input"] = any(is_text_side(name) for name in tensors)
        width = len(tensors["llm_proj.weight"])
        names = [name for name in language_models if name and width_of_llm(name) == width]
        values |= {"llm_model": names[0]} if names else {}
        words = next((name for name in tensors if name.endswith(_WORDS)), None)
        if names and words and len(tensors[words]) != sizes_of_llm(names[0], {})["vocab_size"]:
            values["llm"] = {"sizes": {"vocab_size": len(tensors[words])}}
    return Sizes(values, unknown)


def is_text_side(name: str) -> bool:
    """Whether a tensor belongs to what a Q-Former has for texts alone."""
    return _TEXT_SIDE.match(name) is not None


def adopt_stage2(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], llm_may_stay: bool = False
) -> Adopted:
    """Weights of stage 1, of stage 2 or of InstructBLIP for a model with a language model.

    What only stage 1 has is left out; the projection starts anew where there is none, or one for a language
    model of another width; the text side of the Q-Former where the weights have none.

    Args:
        tensors: by our names.
        wanted: the state dict of the model that takes them over.
        llm_may_stay: its language model is meant to be random, and stays so beside weights of stage 1.
    """
    projection = "llm_proj.weight"
    other = projection in tensors and tensors[projection].shape != wanted[projection].shape
    left_out: dict[str, str] = {}
    taken: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_STAGE1_ONLY):
            left_out[name] = NO_OBJECTIVE
        elif other and name.startswith("llm_proj."):
            left_out[name] = OTHER_LLM
        elif name not in wanted and is_text_side(name):
            left_out[name] = NO_TEXT
        else:
            taken[name] = tensor
    stage1 = any(name.startswith(_STAGE1_ONLY) for name in tensors)
    reads = any(is_text_side(name) for name in tensors)
    may_stay = ["llm.lora.", *(["llm_proj."] if stage1 or other else [])]
    may_stay += ["llm.model."] if stage1 and llm_may_stay else []
    kept = [n for n in wanted if n.startswith(tuple(may_stay)) or (is_text_side(n) and not reads)]
    return Adopted(taken, left_out, [name for name in kept if name not in taken])
