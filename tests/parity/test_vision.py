"""Our towers against transformers, timm and recorded outputs of LAVIS, with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from blip.layers.vit import NAMED, Vit, resize_pos_embed
from blip.models.vision import VisionConfig, VisionTower

GOLDENS = Path(__file__).parent / "goldens"
# Two heads of 88, as in EVA-g, an MLP that is no multiple of the width, 5 x 5 patches.
SIZES: dict[str, Any] = {
    "image_size": 40,
    "patch_size": 8,
    "width": 176,
    "depth": 3,
    "heads": 2,
    "mlp_dim": 300,
}
HF_SIZES: dict[str, Any] = {
    "image_size": 40,
    "patch_size": 8,
    "hidden_size": 176,
    "num_attention_heads": 2,
    "intermediate_size": 300,
}
# float32 sums of a few hundred products of values around 1, in another order.
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def image(size: int = 40) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def tower(name: str, **overrides: Any) -> VisionTower:
    return VisionTower(VisionConfig(name, **{**SIZES, **overrides})).eval()


def randomize(module: nn.Module) -> None:
    """Weights of a size at which nothing is negligible: biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else noise * (0.2 if parameter.ndim == 1 else 0.05))


def hf_block(k: int) -> dict[str, str]:
    """Our names -> transformers', for BLIP and BLIP-2 towers."""
    ours, theirs = f"blocks.{k}.", f"encoder.layers.{k}."
    parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.projection"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names = {f"{ours}{a}.{w}": f"{theirs}{b}.{w}" for a, b in parts.items() for w in ("weight", "bias")}
    return names | {f"{ours}attn.qkv.weight": f"{theirs}self_attn.qkv.weight"}


def hf_names(depth: int) -> dict[str, str]:
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    }
    for k in range(depth):
        names |= hf_block(k)
    return names


def test_eva_is_transformers_blip2_vision_model() -> None:
    ours = tower("eva_clip_g")
    randomize(ours)
    theirs = Blip2VisionModel(Blip2VisionConfig(**HF_SIZES, num_hidden_layers=3, layer_norm_eps=1e-6)).eval()
    mine = ours.vit.state_dict()
    state = {hf: mine[name] for name, hf in hf_names(3).items()}
    for k in range(3):
        query, value = mine[f"blocks.{k}.attn.q_bias"], mine[f"blocks.{k}.attn.v_bias"]
        state[f"encoder.layers.{k}.self_attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    state |= {"post_layernorm.weight": torch.ones(176), "post_layernorm.bias": torch.zeros(176)}
    theirs.load_state_dict(state)
    with torch.no_grad():
        # transformers keeps `ln_vision` inside, with the epsilon of the blocks.
        expected = theirs(image()).last_hidden_state
        states = ours(image())
    assert states.shape == (3, 26, 176)
    torch.testing.assert_close(F.layer_norm(states, (176,), eps=1e-6), expected, **CLOSE)


def test_clip_is_transformers_clip_before_its_last_layer() -> None:
    ours = tower("clip_L")
    randomize(ours)
    config = CLIPVisionConfig(
        **HF_SIZES, num_hidden_layers=4, layer_norm_eps=1e-5, hidden_act="quick_gelu", projection_dim=16
    )
    theirs = CLIPVisionModel(config).eval()
    vision: Any = getattr(theirs, "vision_model", theirs)
    mine = ours.vit.state_dict()
    state = {
        "embeddings.class_embedding": mine["cls_token"].flatten(),
        "embeddings.position_embedding.weight": mine["pos_embed"][0],
        "embeddings.patch_embedding.weight": mine["patch_embed.proj.weight"],
        "pre_layrnorm.weight": mine["norm_pre.weight"],
        "pre_layrnorm.bias": mine["norm_pre.bias"],
    }
    parts = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for k in range(3):
        for kind in ("weight", "bias"):
            for a, b in parts.items():
                state[f"encoder.layers.{k}.{b}.{kind}"] = mine[f"blocks.{k}.{a}.{kind}"]
            for part, tensor in zip("qkv", mine[f"blocks.{k}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"encoder.layers.{k}.self_attn.{part}_proj.{kind}"] = tensor
    result = vision.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith(("encoder.layers.3.", "post_layernorm")) for name in result.missing_keys)
    with torch.no_grad():
        expected = theirs(image(), output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours(image()), expected, **CLOSE)


@pytest.mark.parametrize("name", ["vit_base", "vit_large"])
def test_blip_vit_is_transformers_blip_vision_model(name: str) -> None:
    ours = tower(name)
    randomize(ours)
    theirs = BlipVisionModel(BlipVisionConfig(**HF_SIZES, num_hidden_layers=3, layer_norm_eps=1e-6)).eval()
    mine = ours.vit.state_dict()
    names = hf_names(3) | {"norm.weight": "post_layernorm.weight", "norm.bias": "post_layernorm.bias"}
    names |= {f"blocks.{k}.attn.qkv.bias": f"encoder.layers.{k}.self_attn.qkv.bias" for k in range(3)}
    assert names.keys() == mine.keys()
    theirs.load_state_dict({hf: mine[key] for key, hf in names.items()})
    with torch.no_grad():
        torch.testing.assert_close(ours(image()), theirs(image()).last_hidden_state, **CLOSE)


TIMM_SIZES: dict[str, Any] = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def test_blip_vit_is_timms_vit_with_the_same_weights() -> None:
    theirs: Any = timm.create_model("vit_base_patch16_224", num_classes=0, **TIMM_SIZES).eval()
    randomize(theirs)
    ours = tower("vit_base", width=48, depth=2, heads=3, mlp_dim=192)
    ours.vit.load_state_dict(theirs.state_dict())  # the names are the same
    with torch.no_grad():
        torch.testing.assert_close(ours(image()), theirs.forward_features(image()), **CLOSE)


@pytest.mark.parametrize(
    ("name", "num_prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_base_patch16_siglip_224", 0),
        ("vit_large_patch14_clip_quickgelu_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("eva02_tiny_patch14_224", 1),
        ("beit_base_patch16_224", 1),
    ],
)
def test_a_timm_tower_gives_timms_tokens(name: str, num_prefix: int) -> None:
    torch.manual_seed(0)
    theirs: Any = timm.create_model(name, num_classes=0, **TIMM_SIZES).eval()
    ours = tower(f"timm/{name}", width=48, depth=2, heads=3, mlp_dim=None)
    randomize(theirs)
    result = ours.vit.load_state_dict(theirs.state_dict(), strict=False)
    assert not result.missing_keys
    # What stays behind serves pooling, which comes after the tokens.
    assert all(key.startswith(("attn_pool.", "fc_norm.")) for key in result.unexpected_keys)
    with torch.no_grad():
        states = ours(image())
        assert torch.equal(states, theirs.forward_features(image()))
    assert states.shape == (3, num_prefix + 25, 48)
    assert (ours.num_tokens, ours.width, ours.num_layers) == (num_prefix + 25, 48, 2)


def test_timms_eva_giant_is_ours() -> None:
    theirs: Any = timm.create_model(
        "eva_giant_patch14_clip_224", num_classes=0, mlp_ratio=4.0, init_values=None, **TIMM_SIZES
    ).eval()
    randomize(theirs)
    ours = tower("eva_clip_g", width=48, depth=2, heads=3, mlp_dim=192)
    state = theirs.state_dict()
    ours.vit.load_state_dict({key: state[key] for key in ours.vit.state_dict()})
    with torch.no_grad():
        expected = theirs.forward_intermediates(
            image(), norm=False, intermediates_only=True, return_prefix_tokens=True
        )
        patches, prefix = expected[-1]
        expected = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(ours(image()), expected, **CLOSE)


@pytest.mark.parametrize("key", ["pos_embed_4_to_6", "eva_pos_embed_4_to_6"])
def test_position_interpolation_is_lavis(key: str) -> None:
    golden = torch.load(GOLDENS / "aux_images.pt", weights_only=True)
    torch.testing.assert_close(resize_pos_embed(golden["pos_embed_in"], (6, 6)), golden[key], **CLOSE)


def test_parameter_counts_are_transformers_counts() -> None:
    with torch.device("meta"):
        theirs = {
            "eva_clip_g": Blip2VisionModel(Blip2VisionConfig()),
            "vit_base": BlipVisionModel(BlipVisionConfig(image_size=224, layer_norm_eps=1e-6)),
        }
        ours = {name: Vit(NAMED[name]) for name in theirs}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in theirs.items()}
    mine = {name: sum(p.numel() for p in model.parameters()) for name, model in ours.items()}
    # theirs has `ln_vision` inside, and a bias of the keys, always zero, in each of the 39 blocks
    assert count["eva_clip_g"] == mine["eva_clip_g"] + 2 * 1408 + 39 * 1408
    assert count["vit_base"] == mine["vit_base"] == 85_798_656
