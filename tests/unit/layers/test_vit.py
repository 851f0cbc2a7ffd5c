"""Facts about the vision transformer: variants, initial values, drop path, position embeddings, layer ids."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.errors import CheckpointError
from blip.layers.vit import (
    NAMED,
    LayerNorm,
    Vit,
    VitAttention,
    VitBlock,
    VitConfig,
    drop_path,
    layer_id,
    rename_openai_clip,
    resize_pos_embed,
)

SMALL = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 3, "heads": 3, "mlp_dim": 40}


def small(name: str, **overrides: object) -> VitConfig:
    return replace(NAMED[name], **{**SMALL, **overrides})  # type: ignore[arg-type]


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_towers_have_the_published_sizes() -> None:
    with torch.device("meta"):
        counts = {name: num_parameters(Vit(config)) for name, config in NAMED.items()}
    # 985.95 M is transformers' count: with `ln_vision` behind the tower and 39 key biases that are zero.
    assert counts["eva_clip_g"] == 985_894_528
    assert round((counts["eva_clip_g"] + 2 * 1408 + 39 * 1408) / 1e6, 2) == 985.95
    assert counts["vit_base"] == 85_798_656
    assert counts["vit_large"] == 303_301_632
    # OpenAI's file has one more block, a LayerNorm and a projection behind the blocks.
    block = sum(p.numel() for p in VitBlock(NAMED["clip_L"], 0.0).parameters())
    assert counts["clip_L"] + block + 2 * 1024 + 1024 * 768 == 303_966_208


def test_eva_gives_all_tokens_of_the_block_before_the_last_of_forty() -> None:
    eva = NAMED["eva_clip_g"]
    assert (eva.depth, 1 + math.prod(eva.grid), eva.mlp_dim) == (39, 257, int(1408 * 4.3637))
    assert not eva.final_norm


@pytest.mark.parametrize("name", NAMED)
def test_output_has_every_token(name: str) -> None:
    vit = Vit(small(name))
    assert vit(image()).shape == (2, 17, 24)
    assert vit.num_tokens == 17


def test_eva_has_no_key_bias_parameter_and_adds_none() -> None:
    torch.manual_seed(0)
    attention = VitAttention(small("eva_clip_g"))
    assert dict(attention.named_parameters()).keys() == {
        "q_bias",
        "v_bias",
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    }
    assert attention.q_bias is not None
    assert attention.v_bias is not None
    with torch.no_grad():
        attention.q_bias.normal_()
        attention.v_bias.normal_()
    hidden = torch.randn(2, 5, 24)
    query, key, value = F.linear(hidden, attention.qkv.weight).chunk(3, dim=-1)
    heads = [
        x.unflatten(-1, (3, 8)).transpose(1, 2)
        for x in (query + attention.q_bias, key, value + attention.v_bias)
    ]
    scores = (heads[0] / math.sqrt(8)) @ heads[1].transpose(-1, -2)
    expected = attention.proj((scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(hidden), expected)


def test_initial_values_are_the_references() -> None:
    torch.manual_seed(0)
    eva, blip = Vit(small("eva_clip_g", width=96, mlp_dim=400)), Vit(small("vit_base", width=96, mlp_dim=400))
    for vit in (eva, blip):
        for name, parameter in vit.named_parameters():
            if "norm" in name:
                assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
            elif name.startswith("blocks") and "bias" in name:
                assert not parameter.any()
            elif name in ("cls_token", "pos_embed") or name.endswith(("qkv.weight", "fc1.weight")):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    for k, (scaled, plain) in enumerate(zip(eva.blocks, blip.blocks, strict=True), start=1):
        for name in ("attn.proj", "mlp.fc2"):
            assert plain.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02, rel=0.05)
            expected = 0.02 / math.sqrt(2 * k)
            assert scaled.get_parameter(f"{name}.weight").std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("depth", "rates"), [(1, [0.0]), (3, [0.0, 0.1, 0.2]), (5, [0.0, 0.05, 0.1, 0.15, 0.2])]
)
def test_drop_path_rises_linearly_to_the_rate_given(depth: int, rates: list[float]) -> None:
    vit = Vit(small("vit_large", depth=depth, drop_path_rate=0.2))
    assert [block.drop_path_rate for block in vit.blocks] == pytest.approx(rates)


def test_no_drop_path_unless_asked_for() -> None:
    # LAVIS's ViT-L writes `0.1 or rate`, which drops whatever is passed.
    assert [block.drop_path_rate for block in Vit(small("vit_large")).blocks] == [0.0, 0.0, 0.0]


def test_drop_path_leaves_out_whole_samples_and_scales_up_the_others() -> None:
    torch.manual_seed(0)
    branch = torch.randn(4000, 2, 3)
    dropped = drop_path(branch, 0.25, training=True)
    out = (dropped == 0).flatten(1).all(dim=1)
    assert out.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped[~out], branch[~out] / 0.75)
    assert drop_path(branch, 0.25, training=False) is branch
    assert drop_path(branch, 0.0, training=True) is branch


def test_drop_path_acts_in_training_only() -> None:
    torch.manual_seed(0)
    vit = Vit(small("vit_base", drop_path_rate=0.9))
    assert not torch.equal(vit.train()(image()), vit(image()))
    assert torch.equal(vit.eval()(image()), vit(image()))


def test_layer_norm_of_half_input_computes_in_float32() -> None:
    norm = LayerNorm(16, eps=1e-6)
    x = (torch.randn(4, 16) * 300).half()  # the squares overflow fp16
    expected = F.layer_norm(x.float(), (16,), norm.weight, norm.bias, 1e-6).half()
    assert torch.equal(norm(x), expected)
    assert norm.half()(x).dtype == torch.float16
    assert torch.equal(norm(x), expected)


def test_resize_to_the_same_grid_gives_the_same_tensor() -> None:
    pos = torch.randn(1, 17, 8)
    assert resize_pos_embed(pos, (4, 4)) is pos


def test_resize_keeps_prefix_tokens_and_reaches_grids_that_are_not_square() -> None:
    pos = torch.randn(1, 2 + 16, 8)
    wide = resize_pos_embed(pos, (3, 7), num_prefix=2)
    assert wide.shape == (1, 2 + 21, 8)
    assert torch.equal(wide[:, :2], pos[:, :2])
    tall = resize_pos_embed(pos, (7, 3), num_prefix=2)
    swapped = pos[:, 2:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    transposed = resize_pos_embed(torch.cat([pos[:, :2], swapped], dim=1), (3, 7), num_prefix=2)
    torch.testing.assert_close(
        tall[:, 2:].unflatten(1, (7, 3)).transpose(1, 2), transposed[:, 2:].unflatten(1, (3, 7))
    )
    back = resize_pos_embed(wide, (4, 4), num_prefix=2, source_grid=(3, 7))
    assert back.shape == pos.shape


def test_resize_with_aligned_corners_keeps_the_corners() -> None:
    pos = torch.randn(1, 1 + 16, 8)
    corners = lambda p, n: p[:, 1:].unflatten(1, (n, n))[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # noqa: E731
    aligned = resize_pos_embed(pos, (6, 6), align_corners=True)
    torch.testing.assert_close(corners(aligned, 6), corners(pos, 4))
    plain = resize_pos_embed(pos, (6, 6), align_corners=False)
    assert not torch.allclose(corners(plain, 6), corners(pos, 4), atol=1e-3)


def test_resize_computes_halves_in_float32() -> None:
    pos = torch.randn(1, 17, 8).half()
    assert torch.equal(resize_pos_embed(pos, (6, 6)), resize_pos_embed(pos.float(), (6, 6)).half())


@pytest.mark.parametrize(("length", "num_prefix"), [(19, 1), (1, 1), (17, 0)])
def test_resize_refuses_what_is_no_square_grid(length: int, num_prefix: int) -> None:
    with pytest.raises(CheckpointError, match=f"{length} positions"):
        resize_pos_embed(torch.randn(1, length, 4), (3, 3), num_prefix)


@pytest.mark.parametrize(("name", "align_corners"), [("eva_clip_g", False), ("clip_L", True)])
def test_weights_of_another_size_are_interpolated_when_loaded(name: str, align_corners: bool) -> None:
    source, larger = Vit(small(name)), Vit(small(name, image_size=48))
    state = source.state_dict()
    larger.load_state_dict(state)
    expected = resize_pos_embed(source.pos_embed.detach(), (6, 6), align_corners=align_corners)
    assert torch.equal(larger.pos_embed, expected)
    assert state["pos_embed"].shape == (1, 17, 24)  # the caller's tensors are left alone
    assert larger(image(48)).shape == (2, 37, 24)


def test_weights_of_another_size_are_interpolated_inside_a_larger_model() -> None:
    whole = nn.ModuleDict({"tower": Vit(small("vit_base", image_size=48))})
    source = Vit(small("vit_base"))
    whole.load_state_dict({f"tower.{name}": tensor for name, tensor in source.state_dict().items()})
    assert torch.equal(
        whole.get_parameter("tower.pos_embed"), resize_pos_embed(source.pos_embed.detach(), (6, 6))
    )


def test_weights_of_another_width_are_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        Vit(small("vit_base")).load_state_dict(Vit(small("vit_base", width=48, image_size=48)).state_dict())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cls_token", 0),
        ("pos_embed", 0),
        ("patch_embed.proj.weight", 0),
        ("patch_embed.proj.bias", 0),
        ("norm_pre.weight", 0),
        ("norm_pre.bias", 0),
        ("reg_token", 0),
        ("blocks.0.attn.q_bias", 1),
        ("blocks.9.norm1.weight", 10),
        ("blocks.38.mlp.fc2.bias", 39),
        ("norm.weight", 39),
    ],
)
def test_layer_ids_are_lavis_eva_ids_and_match_by_prefix(name: str, expected: int) -> None:
    assert layer_id(name, num_layers=39) == expected


def test_openai_names_become_ours() -> None:
    ours = Vit(small("clip_L")).state_dict()
    theirs = {
        "class_embedding": ours["cls_token"].flatten(),
        "positional_embedding": ours["pos_embed"][0],
        "conv1.weight": ours["patch_embed.proj.weight"],
        "ln_pre.weight": ours["norm_pre.weight"],
        "ln_pre.bias": ours["norm_pre.bias"],
    }
    parts = {
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj.weight": "attn.proj.weight",
        "attn.out_proj.bias": "attn.proj.bias",
        "ln_1.weight": "norm1.weight",
        "ln_1.bias": "norm1.bias",
        "ln_2.weight": "norm2.weight",
        "ln_2.bias": "norm2.bias",
        "mlp.c_fc.weight": "mlp.fc1.weight",
        "mlp.c_fc.bias": "mlp.fc1.bias",
        "mlp.c_proj.weight": "mlp.fc2.weight",
        "mlp.c_proj.bias": "mlp.fc2.bias",
    }
    for k in range(3):
        theirs |= {f"transformer.resblocks.{k}.{a}": ours[f"blocks.{k}.{b}"] for a, b in parts.items()}
    renamed = rename_openai_clip(theirs)
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"heads": 5}, "heads"),
        ({"image_size": 33}, "image_size"),
        ({"image_size": 4}, "image_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"depth": 0}, "depth"),
        ({"stem_width": -1}, "stem_width"),
        ({"stem_width": 4, "stem_stride": 3}, "stem_stride"),
        ({"stem_width": 4, "stem_stride": 0}, "stem_stride"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, float], key: str) -> None:
    problems = small("vit_base", **sizes).problems()
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}:")
    assert not small("vit_base").problems()


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_stem_keeps_the_grid_of_patches(stride: int) -> None:
    config = small("vit_base", stem_width=5, stem_stride=stride)
    vit = Vit(config)
    assert vit.patch_embed.stem.weight.shape == (5, 3, 2 * stride + 1, 2 * stride + 1)
    assert vit.patch_embed.proj.weight.shape == (24, 5, 8 // stride, 8 // stride)
    assert vit(image()).shape == (2, 17, 24)
    # A pixel reaches the patches next to its own, and no others.
    moved = image()
    moved[:, :, 8:16, 15] += 1  # row 1, the right edge of column 1
    near = (vit.patch_embed(moved) - vit.patch_embed(image())).abs().amax((0, 2)).reshape(4, 4) > 1e-6
    assert near[1, 1]
    assert near[1, 2]
    assert not near[:, 0].any()
    assert not near[3].any()
    sharp = Vit(small("vit_base", stem_width=5, stem_stride=stride, act="quick_gelu"))
    sharp.load_state_dict(vit.state_dict())
    assert not torch.equal(sharp.patch_embed(image()), vit.patch_embed(image()))
    without = small("vit_base").problems() + small("vit_base", stem_stride=3).problems()
    assert without == []
    assert "patch_embed.stem" not in " ".join(Vit(small("vit_base")).state_dict())


def test_positions_may_start_larger_than_matrices() -> None:
    torch.manual_seed(0)
    vit = Vit(small("vit_base", image_size=64, pos_std=0.5))
    assert 0.45 < vit.pos_embed.std() < 0.55
    assert 0.015 < vit.blocks[0].mlp.fc1.weight.std() < 0.025
    assert Vit(small("vit_base", image_size=64)).pos_embed.std() < 0.03
