"""What the tensors of a stage-1 model tell of its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blip.models.blip2_weights import stage1_sizes


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"vit_model": "eva_clip_g"}),
        ({"ln_vision.weight": (1024,)}, {"vit_model": "clip_L"}),
        (
            {
                "vision.vit.patch_embed.proj.weight": (1408, 3, 14, 14),
                "vision.vit.blocks.0.attn.q_bias": (1408,),
                "vision.vit.blocks.38.norm1.weight": (1408,),
                "vision.vit.pos_embed": (1, 677, 1408),
            },
            {"vit_model": "eva_clip_g", "image_size": 364, "vit": {"depth": 1}},
        ),
        (
            {
                "vision.vit.patch_embed.proj.weight": (1024, 3, 14, 14),
                "vision.vit.norm_pre.weight": (1024,),
                "vision.vit.pos_embed": (1, 257, 1024),
            },
            {"vit_model": "clip_L", "image_size": 224, "vit": {"depth": 0}},
        ),
    ],
)
def test_published_sizes_leave_nothing_open(
    change: dict[str, tuple[int, ...]], expected: dict[str, Any]
) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "ln_vision.weight": (1408,),
        "qformer.query_tokens": (1, 32, 768),
        "vision_proj.weight": (256, 768),
        "qformer.embedding.word.weight": (30523, 768),
        "qformer.embedding.position.weight": (512, 768),
        "qformer.layers.0.query_ffn.expand.weight": (3072, 768),
        "qformer.layers.0.self_attn.query.weight": (768, 768),
        "qformer.layers.0.cross_attn.query.weight": (768, 768),
        "qformer.layers.1.self_attn.query.weight": (768, 768),
        "qformer.layers.2.self_attn.query.weight": (768, 768),
        "qformer.layers.2.cross_attn.query.weight": (768, 768),
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in {**shapes, **change}.items()}
    values, unknown = stage1_sizes(tensors)
    sizes = {"width": 768, "depth": 3, "mlp_dim": 3072, "max_positions": 512}
    common = {"num_query_token": 32, "vocab_size": 30523, "embed_dim": 256, "cross_attention_freq": 2}
    assert (values, unknown) == ({**common, "qformer": sizes, **expected}, [])
