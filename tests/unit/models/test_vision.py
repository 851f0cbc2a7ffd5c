"""Facts about vision towers: names and sizes, freezing, precision, initial weights, timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.config.schema import SectionError
from blip.errors import BlipError, CheckpointError, ConfigError, UsageError
from blip.layers.vit import resize_pos_embed
from blip.models.vision import VisionConfig, VisionTower

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 3, "heads": 3}
TIMM_SMALL: dict[str, Any] = {**SMALL, "vit_model": "timm/vit_tiny_patch16_224"}
ALL = [
    "eva_clip_g",
    "clip_L",
    "vit_base",
    "vit_large",
    "timm/vit_tiny_patch16_224",
    "timm/vit_small_patch14_reg4_dinov2",
]


def tower(vit_model: str = "eva_clip_g", **overrides: Any) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(VisionConfig(**{**SMALL, "vit_model": vit_model, **overrides}))


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def message(error: pytest.ExceptionInfo[BlipError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Names and sizes


@pytest.mark.parametrize("vit_model", ALL)
def test_a_tower_says_the_shape_it_gives(vit_model: str) -> None:
    vision = tower(vit_model)
    states = vision(image())
    assert states.shape == (2, vision.num_tokens, vision.width)
    assert states.shape == (2, 21 if "reg4" in vit_model else 17, 24)
    assert len(vision.blocks()) == vision.num_layers == 3


def test_what_is_not_given_is_the_named_towers() -> None:
    sizes = VisionConfig("clip_L", depth=2).resolve()
    assert (sizes.image_size, sizes.patch_size, sizes.width, sizes.depth, sizes.heads) == (
        224,
        14,
        1024,
        2,
        16,
    )
    assert (sizes.mlp_dim, sizes.norm_eps, sizes.act) == (4096, 1e-5, "quick_gelu")


@pytest.mark.parametrize(
    ("vit_model", "expected"), [("eva_clip_g", int(192 * 4.3637)), ("vit_base", 192 * 4)]
)
def test_the_mlp_keeps_its_proportion_to_another_width(vit_model: str, expected: int) -> None:
    assert VisionConfig(vit_model, width=192).resolve().mlp_dim == expected
    assert VisionConfig(vit_model, width=192, mlp_dim=100).resolve().mlp_dim == 100


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"vit_model": "eva_clip_G"}, ["model.vit_model", "'eva_clip_G'", "did you mean 'eva_clip_g'"]),
        ({"vit_model": "resnet"}, ["model.vit_model", "eva_clip_g", "vit_large", "timm/"]),
        ({"heads": 5}, ["model.vit.heads: 5", "width 24"]),
        ({"image_size": 30}, ["model.image_size: 30", "patch size 8", "24 or 32"]),
        ({"heads": 5, "image_size": 30}, ["model.vit.heads", "model.image_size"]),
        ({"vit_model": "timm/resnet50"}, ["timm/resnet50", "not a plain vision transformer"]),
        ({"vit_model": "timm/vit_tiny_patch16_244"}, ["does not exist in timm", "timm/vit_tiny_patch16_224"]),
        ({"vit_model": "timm/vit_tiny_patch16_224", "norm_eps": 1e-5}, ["model.vit.norm_eps"]),
        (
            {"vit_model": "timm/vit_tiny_patch16_224", "heads": 5},
            ["model.vit", "vit_tiny_patch16_224", "num_heads"],
        ),
    ],
)
def test_what_cannot_be_built_is_explained(overrides: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        tower(**{"vit_model": "vit_base", **overrides})
    assert [part for part in parts if part not in message(error)] == []


@pytest.mark.parametrize(
    "overrides",
    [{"depth": 0}, {"drop_path_rate": 1.0}, {"norm_eps": 0.0}, {"checkpoint_last": -1}, {"image_size": -8}],
)
def test_values_no_tower_can_have_are_refused_in_the_config(overrides: dict[str, Any]) -> None:
    with pytest.raises(SectionError, match=rf"model\.vit\.{next(iter(overrides))}"):
        VisionConfig(**overrides)


def test_an_image_of_another_size_is_an_error_that_names_both() -> None:
    for vit_model in ("eva_clip_g", "timm/vit_tiny_patch16_224"):
        with pytest.raises(ConfigError) as error:
            tower(vit_model)(image(40))
        assert "32 x 32" in message(error)
        assert "40 x 40" in message(error)


def test_images_must_be_normalised() -> None:
    with pytest.raises(UsageError, match="uint8"):
        tower()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("vit_model", ALL)
def test_layer_ids_cover_the_depth(vit_model: str) -> None:
    vision = tower(vit_model)
    ids = {name: vision.layer_id(name) for name, _ in vision.named_parameters()}
    assert set(ids.values()) == {0, 1, 2, 3}
    assert {name.split(".")[1] for name, i in ids.items() if i == 0} <= {
        "cls_token",
        "reg_token",
        "pos_embed",
        "patch_embed",
        "norm_pre",
    }
    assert all(i == int(name.split(".")[2]) + 1 for name, i in ids.items() if name.startswith("vit.blocks."))
    assert all(ids[name] == 3 for name in ids if name.startswith("vit.norm."))


# Freezing and precision


@pytest.mark.parametrize("vit_model", ALL)
def test_every_parameter_of_a_trained_tower_gets_a_gradient(vit_model: str) -> None:
    vision = tower(vit_model).train()
    vision(image()).square().mean().backward()
    assert [name for name, p in vision.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("vit_model", ["eva_clip_g", "timm/vit_tiny_patch16_224"])
def test_train_does_not_undo_freezing(vit_model: str) -> None:
    vision = tower(vit_model, freeze=True, drop_path_rate=0.9)
    whole = torch.nn.ModuleDict({"vision": vision})
    whole.train()
    assert whole.training
    assert not any(module.training for module in vision.modules())
    first, second = vision(image()), vision(image())
    assert torch.equal(first, second)  # drop path rests
    assert not first.requires_grad
    assert not any(p.requires_grad for p in vision.parameters())


def test_freezing_forgets_gradients() -> None:
    vision = tower(precision="fp16").train()
    vision(image()).sum().backward()
    vision.freeze()
    assert vision.frozen
    assert all(p.grad is None for p in vision.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_only_linear_and_convolution_weights_become_half(precision: str, dtype: torch.dtype) -> None:
    vision = tower(freeze=True, precision=precision)
    half = {name.removeprefix("vit.") for name, p in vision.named_parameters() if p.dtype == dtype}
    whole = {name.removeprefix("vit.") for name, p in vision.named_parameters() if p.dtype == torch.float32}
    assert half == {"patch_embed.proj.weight", "patch_embed.proj.bias"} | {
        f"blocks.{k}.{part}"
        for k in range(3)
        for part in (
            "attn.qkv.weight",
            "attn.proj.weight",
            "attn.proj.bias",
            "mlp.fc1.weight",
            "mlp.fc1.bias",
            "mlp.fc2.weight",
            "mlp.fc2.bias",
        )
    }
    assert {
        "cls_token",
        "pos_embed",
        "blocks.0.attn.q_bias",
        "blocks.0.attn.v_bias",
        "blocks.0.norm1.weight",
    } <= whole


# Relative rounding of the weights and of the products: 2^-11 and 2^-8, of values up to about 3.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("bf16", 0.08)])
@pytest.mark.parametrize("vit_model", ["eva_clip_g", "clip_L", "timm/vit_tiny_patch16_224"])
def test_a_half_tower_needs_no_autocast_and_is_near_the_whole_one(
    vit_model: str, precision: str, tolerance: float
) -> None:
    vision = tower(vit_model, precision=precision).eval()
    expected = vision(image()).detach()
    vision.freeze()
    states = vision(image())
    assert states.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    torch.testing.assert_close(states.float(), expected, atol=tolerance, rtol=0)
    assert not torch.equal(states.float(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the runner's own does not matter
        assert torch.equal(vision(image()), states)


def test_precision_waits_for_freezing() -> None:
    assert {p.dtype for p in tower(precision="fp16").parameters()} == {torch.float32}
    states = tower(freeze=True, precision="fp32")(image())
    assert states.dtype == torch.float32
    assert torch.equal(states, tower()(image()))


# Initial weights


def save(state: dict[str, Tensor], path: Path) -> str:
    torch.save({"model": state}, path)
    return str(path)


def test_building_reads_nothing(tmp_path: Path) -> None:
    assert tower(init_from=str(tmp_path / "absent.pth")).num_layers == 3
    assert tower(init_from=None).load_initial() == []


def test_weights_load_by_lavis_names(tmp_path: Path) -> None:
    source = tower()
    plain = {name.removeprefix("vit."): tensor for name, tensor in source.state_dict().items()}
    whole = {f"visual_encoder.{name}": tensor for name, tensor in plain.items()} | {
        "query_tokens": torch.zeros(1)
    }
    ours = {f"vision.{name}": tensor for name, tensor in source.state_dict().items()} | {
        "temp": torch.zeros(())
    }
    for i, state in enumerate((plain, whole, ours)):
        loaded = tower(init_from=save(state, tmp_path / f"{i}.pth"), depth=3)
        with torch.no_grad():
            loaded.vit.pos_embed.zero_()
        report = loaded.load_initial()
        assert len(report) == 1
        assert torch.equal(loaded(image()), source(image()))


def test_weights_load_from_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    source = tower("vit_base")
    save_file(dict(source.vit.state_dict()), tmp_path / "vit.safetensors")
    torch.manual_seed(1)
    loaded = VisionTower(VisionConfig("vit_base", **SMALL, init_from=str(tmp_path / "vit.safetensors")))
    loaded.load_initial()
    assert torch.equal(loaded(image()), source(image()))


def test_openai_clip_weights_load_without_their_last_block(tmp_path: Path) -> None:
    source = tower("clip_L", depth=4)
    to_openai = {
        "patch_embed.proj.weight": "conv1.weight",
        "norm_pre": "ln_pre",
        "attn.qkv.weight": "attn.in_proj_weight",
        "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "blocks.": "transformer.resblocks.",
    }
    state = {"ln_post.weight": torch.ones(24), "ln_post.bias": torch.zeros(24), "proj": torch.zeros(24, 8)}
    for name, tensor in source.vit.state_dict().items():
        if name == "cls_token":
            state["class_embedding"] = tensor[0, 0]
        elif name == "pos_embed":
            state["positional_embedding"] = tensor[0]
        else:
            for ours, theirs in to_openai.items():
                name = name.replace(ours, theirs)
            state[name] = tensor
    torch.manual_seed(1)
    loaded = VisionTower(VisionConfig("clip_L", **SMALL, init_from=save(state, tmp_path / "clip.pth")))
    (report,) = loaded.load_initial()
    assert "not used" in report
    hidden = source.vit.patch_embed(image())
    hidden = torch.cat([source.vit.cls_token.expand(2, -1, -1), hidden], dim=1) + source.vit.pos_embed
    hidden = source.vit.norm_pre(hidden)
    for block in source.blocks()[:3]:
        hidden = block(hidden)
    assert torch.equal(loaded(image()), hidden)


@pytest.mark.parametrize("vit_model", ["eva_clip_g", "clip_L", "timm/vit_tiny_patch16_224"])
def test_positions_of_another_size_are_interpolated(vit_model: str, tmp_path: Path) -> None:
    source = tower(vit_model)
    path = save(source.vit.state_dict(), tmp_path / "vit.pth")
    larger = tower(vit_model, image_size=48, init_from=path)
    (report,) = larger.load_initial()
    assert "interpolated" in report
    expected = resize_pos_embed(source.vit.pos_embed.detach(), (6, 6), align_corners=vit_model == "clip_L")
    assert torch.equal(larger.vit.pos_embed, expected)
    assert larger(image(48)).shape == (2, 37, 24)


def test_weights_load_into_a_frozen_half_tower(tmp_path: Path) -> None:
    source = tower(precision="bf16")
    path = save(source.vit.state_dict(), tmp_path / "vit.pth")
    torch.manual_seed(1)
    loaded = VisionTower(VisionConfig("eva_clip_g", **SMALL, freeze=True, precision="bf16", init_from=path))
    loaded.load_initial()
    source.freeze()
    assert torch.equal(loaded(image()), source(image()))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.weight"), ["1 missing (blocks.1.mlp.fc1.weight)"]),
        (lambda s: s.update({"blocks.1.gamma": torch.zeros(2)}), ["1 unknown (blocks.1.gamma)"]),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 7)}), ["cls_token", "(1, 1, 7)", "(1, 1, 24)"]),
        (
            lambda s: s.update({"pos_embed": torch.zeros(1, 50, 24), "blocks.0.norm1.bias": torch.zeros(7)}),
            ["shapes than eva_clip_g: blocks.0.norm1.bias (first: (7,), needed (24,))"],
        ),
        (lambda s: s.update({"blocks.1.attn.k_bias": torch.ones(24)}), ["1 unknown (blocks.1.attn.k_bias)"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: Any, parts: list[str], tmp_path: Path) -> None:
    state = dict(tower().vit.state_dict())
    change(state)
    with pytest.raises(CheckpointError) as error:
        tower(init_from=save(state, tmp_path / "vit.pth")).load_initial()
    assert [part for part in ["vit.pth", "eva_clip_g", *parts] if part not in message(error)] == []


def test_heads_norms_and_zero_key_biases_behind_the_tower_are_left_out(tmp_path: Path) -> None:
    source = tower(depth=4)
    extra = {
        "norm.weight": torch.ones(24),
        "head.weight": torch.ones(5, 24),
        "blocks.1.attn.k_bias": torch.zeros(24),
    }
    path = save({**source.vit.state_dict(), **extra}, tmp_path / "eva.pth")
    (report,) = tower(init_from=path).load_initial()
    assert "not used" in report
    with pytest.raises(CheckpointError, match="missing"):
        tower("vit_base", init_from=path).load_initial()


# timm


def fake_pretrained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let timm make random weights where it would download; returns the names asked for."""
    import timm

    create, asked = timm.create_model, []

    def create_small(name: str, pretrained: bool = False, **sizes: Any) -> Any:
        if not pretrained:
            return create(name, **sizes)
        asked.append(name)
        return create(name, img_size=48, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)

    monkeypatch.setattr(timm, "create_model", create_small)
    return asked


@pytest.mark.parametrize(
    ("vit_model", "init_from", "asked"),
    [
        ("timm/vit_tiny_patch16_224", "timm", "vit_tiny_patch16_224"),
        ("vit_base", "timm/vit_base_patch16_224", "vit_base_patch16_224"),
        ("eva_clip_g", "timm/eva_giant_patch14_clip_224", "eva_giant_patch14_clip_224"),
    ],
)
def test_pretrained_timm_weights_load_with_init_from(
    vit_model: str, init_from: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = fake_pretrained(monkeypatch)
    sizes = {"mlp_dim": int(24 * 4.3637)} if vit_model == "eva_clip_g" else {}
    vision = tower(vit_model, init_from=init_from, **sizes)
    before = vision(image())
    (report,) = vision.load_initial()
    assert names == [asked]
    assert "interpolated" in report
    assert not torch.equal(vision(image()), before)


def test_timm_alone_does_not_name_weights_of_our_towers() -> None:
    with pytest.raises(ConfigError, match="timm/<name>"):
        tower("vit_base", init_from="timm").load_initial()


def test_a_timm_tower_that_cannot_be_fetched_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    vision = tower("timm/vit_tiny_patch16_224", init_from="timm")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match="no route to host"):
        vision.load_initial()


def test_timm_sizes_are_exactly_those_given() -> None:
    vision = tower("timm/vit_tiny_patch16_224", mlp_dim=37, drop_path_rate=0.2)
    assert vision.vit.blocks[0].mlp.fc1.out_features == 37
    assert [round(getattr(b.drop_path1, "drop_prob", 0.0), 3) for b in vision.blocks()] == [0.0, 0.1, 0.2]
