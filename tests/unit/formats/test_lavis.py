"""The table for LAVIS's weights, against the names that LAVIS and our model really have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.errors import CheckpointError
from blip.formats import lavis
from blip.models.blip2_qformer import Blip2Qformer, Blip2QformerConfig
from blip.models.qformer import QFormerConfig
from blip.models.vision import VisionConfig

TOWERS = ["eva_clip_g", "clip_L", "vit_base"]


def model(vit_model: str) -> Blip2Qformer:
    sizes: dict[str, Any] = {
        "vit_model": vit_model,
        "image_size": 28,
        "vit": VisionConfig(patch_size=14, width=24, depth=2, heads=2, mlp_dim=40),
        "qformer": QFormerConfig(width=16, depth=3, num_heads=2, mlp_dim=24, max_positions=12),
    }
    torch.manual_seed(0)
    return Blip2Qformer(
        Blip2QformerConfig(num_query_token=2, embed_dim=8, max_txt_len=10, vocab_size=30, **sizes)
    )


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("vit_model", TOWERS)
def test_every_weight_of_our_model_goes_to_lavis_and_back(vit_model: str) -> None:
    table = lavis.table("blip2", vit_model)
    ours = model(vit_model).state_dict()
    theirs = table.to_theirs(ours).state
    assert_equal(table.to_ours(theirs).state, ours)


def test_names_and_shapes_are_lavis_s() -> None:
    theirs = lavis.table("blip2", "eva_clip_g").to_theirs(model("eva_clip_g").state_dict()).state
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    expected = {
        "query_tokens": (1, 2, 16),
        "ln_vision.weight": (24,),
        "visual_encoder.pos_embed": (1, 5, 24),
        "visual_encoder.patch_embed.proj.weight": (24, 3, 14, 14),
        "visual_encoder.blocks.1.attn.q_bias": (24,),
        "visual_encoder.blocks.1.attn.qkv.weight": (72, 24),
        "visual_encoder.blocks.1.mlp.fc1.weight": (40, 24),
        "Qformer.bert.embeddings.word_embeddings.weight": (30, 16),
        "Qformer.bert.embeddings.position_ids": (1, 12),
        "Qformer.bert.encoder.layer.2.crossattention.self.key.weight": (16, 24),
        "Qformer.bert.encoder.layer.1.intermediate.dense.weight": (24, 16),
        "Qformer.bert.encoder.layer.1.output_query.LayerNorm.bias": (16,),
        "Qformer.cls.predictions.decoder.weight": (30, 16),
        "Qformer.cls.predictions.decoder.bias": (30,),
        "vision_proj.weight": (8, 16),
        "itm_head.weight": (2, 16),
        "temp": (),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not [name for name in shapes if ".layer.1.crossattention." in name]


def test_clip_names_and_shapes_are_openai_s() -> None:
    theirs = lavis.table("blip2", "clip_L").to_theirs(model("clip_L").state_dict()).state
    shapes = {name: tuple(t.shape) for name, t in theirs.items() if name.startswith("visual_encoder.")}
    block = "visual_encoder.transformer.resblocks.1"
    expected = {
        "visual_encoder.class_embedding": (24,),
        "visual_encoder.positional_embedding": (5, 24),
        "visual_encoder.conv1.weight": (24, 3, 14, 14),
        "visual_encoder.ln_pre.bias": (24,),
        f"{block}.attn.in_proj_weight": (72, 24),
        f"{block}.attn.in_proj_bias": (72,),
        f"{block}.attn.out_proj.weight": (24, 24),
        f"{block}.ln_1.weight": (24,),
        f"{block}.mlp.c_fc.weight": (40, 24),
        f"{block}.mlp.c_proj.bias": (24,),
    }
    assert {name: shapes.get(name) for name in expected} == expected


def test_a_checkpoint_without_its_frozen_tower_is_accepted() -> None:
    table = lavis.table("blip2", "eva_clip_g")
    theirs = table.to_theirs(model("eva_clip_g").state_dict()).state
    saved = {name: tensor for name, tensor in theirs.items() if not name.startswith("visual_encoder.")}
    assert not [name for name in table.to_ours(saved).state if name.startswith("vision.")]


def test_an_untied_vocabulary_is_refused() -> None:
    table = lavis.table("blip2")
    theirs = table.to_theirs(model("eva_clip_g").state_dict()).state
    theirs["Qformer.cls.predictions.decoder.weight"] = theirs["Qformer.cls.predictions.decoder.weight"] + 1
    with pytest.raises(CheckpointError, match="tied to the word embeddings"):
        table.to_ours(theirs)


def test_weights_of_stage_2_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no rule for 'opt_proj\.weight'"):
        lavis.table("blip2").to_ours({"opt_proj.weight": torch.zeros(1)})


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'blip2_image_text_matching'"):
        lavis.table("blip2_image_text_match")


def test_lavis_weights_are_told_from_ours() -> None:
    ours = model("vit_base").state_dict()
    assert lavis.looks_like(lavis.table("blip2", "vit_base").to_theirs(ours).state)
    assert not lavis.looks_like(ours)
