"""Weight files of BLIP-2: where LAVIS publishes them, and the sizes that their tensors tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from blip.layers.vit import NAMED
from blip.models.base import Sizes
from blip.models.qformer import QFormerConfig

_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
STAGE1_WEIGHTS = {
    "pretrain": _LAVIS + "blip2_pretrained.pth",
    "pretrain_vitL": _LAVIS + "blip2_pretrained_vitL.pth",
    "coco": _LAVIS + "blip2_finetune_coco.pth",
}
"""Preset -> address; the first two lack the tower, which was frozen."""
STAGE1_STARTS = {**STAGE1_WEIGHTS, "coco": STAGE1_WEIGHTS["pretrain"]}
"""Preset -> address of what LAVIS's model configurations name as `pretrained`."""

TOWER = "vision.vit."
_BLIP_TOWERS = ("vit_base", "vit_large")
_BLIP2_TOWERS = ("eva_clip_g", "clip_L")


def stage1_sizes(tensors: Mapping[str, Tensor]) -> Sizes:
    """What names and shapes tell of a configuration, and what they leave open.

    Numbers of heads leave no trace in the weights; they are those of the published sizes, or open.

    Args:
        tensors: by our names, with or without the tower; others make no sense and give little.
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
