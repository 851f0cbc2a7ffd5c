"""BLIP models whose tower is frozen, from the start or after some steps, in full and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import blip
from blip.errors import ConfigError
from blip.models.vision import VisionConfig

ARCHS = ("blip_caption", "blip_classification", "blip_nlvr", "blip_pretrain", "blip_retrieval", "blip_vqa")
TWINS = ("blip_classification", "blip_pretrain", "blip_retrieval")
VIT: dict[str, Any] = {"patch_size": 16, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 32, "freeze": True}


def small(arch: str, **vit: Any) -> Any:
    torch.manual_seed(0)
    contrast = {"embed_dim": 16, "queue_size": 8} if arch in ("blip_pretrain", "blip_retrieval") else {}
    med = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 32}
    sizes = {"image_size": 32, "vit": VIT | vit, "med": med, "tokenizer": "scenes"}
    return blip.load_model(arch, None, pretrained=False, **sizes, **contrast).train()


def batch(arch: str) -> dict[str, Any]:
    image = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pictures = {"image0": image, "image1": image.flip(0)} if arch == "blip_nlvr" else {"image": image}
    labels = {"label": torch.tensor([0, 1, 0, 1]), "image_id": torch.arange(4)}
    texts = {"text_input": ["a red star"] * 4, "answer": ["yes"] * 4}
    return {**pictures, **labels, **texts, "seed": 0, "step": 1, "iters": 1}


def gradients(model: Any, arch: str) -> dict[str, Tensor]:
    output = model(batch(arch))
    output.loss.backward()
    model.after_step([output])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_frozen_tower_has_no_gradient_and_the_rest_has(arch: str, precision: str) -> None:
    model = small(arch, precision=precision)
    before = {name: value.clone() for name, value in model.vision.state_dict().items()}
    found = gradients(model, arch)
    assert not any(name.startswith("vision.") for name in found)
    assert any(".key.weight" in name and grad.abs().sum() > 0 for name, grad in found.items())
    assert not model.vision.training
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert model.vision.vit.blocks[0].mlp.fc1.weight.dtype == half
    for name, value in model.vision.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tower_trains_first_and_is_frozen_then(arch: str) -> None:
    model = small(arch, train_steps=3, precision="bf16")
    for step in range(3):
        assert not model.on_step(step)
        assert any(name.startswith("vision.") for name in gradients(model, arch))
        model.zero_grad(set_to_none=True)
    assert model.on_step(3)
    assert not model.on_step(4)
    found = gradients(model, arch)
    assert found
    assert not any(name.startswith("vision.") for name in found)
    if arch in TWINS:  # small steps towards the model would be lost to rounding
        ours, theirs = model.vision.state_dict(), model.twin["vision"].state_dict()
        assert theirs["vit.blocks.0.mlp.fc1.weight"].dtype == torch.bfloat16
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        assert not any(parameter.requires_grad for parameter in model.twin.parameters())


@pytest.mark.parametrize("arch", sorted(TWINS))
def test_the_twin_of_a_tower_frozen_in_full_precision_goes_on_following(arch: str) -> None:
    model = small(arch, train_steps=3, precision="fp32")
    with torch.no_grad():
        model.vision.vit.blocks[0].mlp.fc1.weight.add_(1)
    assert model.on_step(3)
    ours, theirs = (some.vit.blocks[0].mlp.fc1.weight for some in (model.vision, model.twin["vision"]))
    assert not torch.equal(theirs, ours)
    model.twin.follow(model, 0.0)
    torch.testing.assert_close(theirs, ours)


def test_features_of_a_tower_in_half_precision() -> None:
    torch.manual_seed(0)
    med = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 32}
    sizes = {"image_size": 32, "vit": VIT | {"precision": "bf16"}, "med": med, "tokenizer": "scenes"}
    extractor = blip.load_model("blip_feature_extractor", None, pretrained=False, embed_dim=16, **sizes)
    samples = {"image": torch.randn(2, 3, 32, 32), "text_input": ["a red star", "a blue moon"]}
    for mode in ("image", "multimodal"):
        states = extractor.extract_features(samples, mode=mode)
        assert all(value.dtype == torch.float32 for value in states.values() if torch.is_tensor(value))
    judge = blip.load_model("blip_image_text_matching", None, pretrained=False, embed_dim=16, **sizes)
    assert judge(samples, match_head="itc").dtype == torch.float32


def test_steps_before_freezing_need_freezing() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.vit\.train_steps: only for a tower that is frozen afterwards"
    ):
        VisionConfig(train_steps=5)
    with pytest.raises(ConfigError, match=r"^model\.vit\.train_steps: -1 is below 0"):
        VisionConfig(train_steps=-1, freeze=True)
