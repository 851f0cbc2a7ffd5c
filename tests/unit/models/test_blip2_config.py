"""Facts about the configuration of stage 1: what is refused, and what the switches mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from blip.config.load import load_config
from blip.config.schema import SectionError
from blip.errors import CheckpointError, ConfigError
from blip.models.blip2_config import Blip2QformerConfig
from blip.models.blip2_qformer import Blip2Qformer
from blip.models.qformer import QFormer, QFormerConfig, QFormerLayer
from blip.models.vision import VisionConfig

SIZES: dict[str, Any] = {
    "vit": VisionConfig(patch_size=8, width=16, depth=1, heads=2, mlp_dim=16),
    "image_size": 16,
    "qformer": {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 16, "max_positions": 32},
    "num_query_token": 2,
    "embed_dim": 4,
    "vocab_size": 30,
}


def problems(**values: Any) -> list[str]:
    """What is wrong, one `key: reason` each."""
    with pytest.raises(SectionError) as caught:
        Blip2QformerConfig(**values)
    assert caught.value.section == "model"
    return caught.value.problems


@pytest.mark.parametrize(
    ("vit", "key"),
    [
        ({"vit_model": "clip_L"}, "vit_model"),
        ({"image_size": 364}, "image_size"),
        ({"drop_path_rate": 0.1}, "drop_path_rate"),
        ({"precision": "bf16"}, "vit_precision"),
        ({"freeze": True}, "freeze_vit"),
        ({"init_from": "tower.pth"}, "vit_init_from"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_keys_of_the_tower_that_the_model_decides_are_refused(vit: dict[str, Any], key: str) -> None:
    (problem,) = problems(vit=VisionConfig(**vit))
    assert problem == f"vit.{next(iter(vit))}: has no effect here, since model.{key} decides; set that one"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"vit_model": "eva_clip"},
            r"vit_model: unknown vision tower 'eva_clip'; did you mean 'eva_clip_g'\?",
        ),
        ({"vit": VisionConfig(heads=7)}, r"vit.heads: .*7.*"),
        ({"image_size": 100}, r"image_size: .*100.*"),
        ({"image_size": 0}, r"image_size: 0 is below 1"),
        ({"vit_precision": "fp8"}, r"vit_precision: 'fp8' is no precision; .*"),
        ({"max_txt_len": 600}, r"max_txt_len: 600 exceeds qformer.max_positions, which is 512"),
        ({"temp": 0.0}, r"temp: 0.0 is not above 0"),
        ({"vit_train_steps": -1}, r"vit_train_steps: -1 is below 0"),
        ({"vit_train_steps": 5, "freeze_vit": False}, r"vit_train_steps: only for a tower that is frozen .*"),
        ({"objectives": []}, r"objectives: empty; name at least one of itc, itm, lm"),
        ({"objectives": ["itg"]}, r"objectives: unknown objective 'itg'; .*itm.*"),
        ({"vit_train_objectives": ["itc"]}, r"vit_train_objectives: only while .* set vit_train_steps.*"),
        ({"vit_train_objectives": []}, r"vit_train_objectives: empty; name at least one of itc, itm, lm"),
        (
            {"vit_train_steps": 5, "vit_train_objectives": ["itc", "itn"]},
            r"vit_train_objectives: unknown objective 'itn'; did you mean 'itm'\?",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_with_its_key(values: dict[str, Any], expected: str) -> None:
    (problem,) = problems(**values)
    assert re.fullmatch(expected, problem)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"width": 30, "num_heads": 4},
            "model.qformer.num_heads: 4 does not divide the width 30; set num_heads or width",
        ),
        ({"depth": 0}, "model.qformer.depth: 0 is below 1"),
        ({"norm_eps": 0.0}, "model.qformer.norm_eps: 0.0 is not above 0"),
    ],
)
def test_sizes_of_a_qformer_are_checked_when_they_are_said(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QFormerConfig(**values)
    assert str(caught.value) == expected


def test_a_qformer_checks_its_sizes_when_it_is_built() -> None:
    config = QFormerConfig(width=16, num_heads=2, mlp_dim=16, depth=1, max_positions=8)
    config.num_heads = 3
    with pytest.raises(ConfigError, match=r"model\.qformer\.num_heads: 3 does not divide"):
        QFormer(config, num_query=2, image_width=8, vocab_size=None)
    config.num_heads = 2
    with pytest.raises(ConfigError, match="num_query 0"):
        QFormer(config, num_query=0, image_width=8, vocab_size=None)


def test_errors_of_the_parts_name_their_keys_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {arch: blip2, qformer: {num_heads: 7}}\nrun: {task: image_text_pretrain, max_iters: 1}\n"
    )
    with pytest.raises(
        ConfigError, match=r"^model\.qformer\.num_heads \(.*recipe\.yaml\): 7 does not divide"
    ):
        load_config(str(file))


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({}, "none"),
        ({"use_grad_checkpoint": True}, "torch"),
        ({"vit": {"checkpoint": "offload"}}, "offload"),
        ({"vit": {"checkpoint": "offload"}, "use_grad_checkpoint": True}, "offload"),
        ({"vit": {"checkpoint": "torch"}}, "torch"),
    ],
)
def test_use_grad_checkpoint_recomputes_with_torch_unless_the_tower_says_otherwise(
    values: dict[str, Any], mode: str
) -> None:
    vit = {**vars(SIZES["vit"]), **values.pop("vit", {})}
    model = Blip2Qformer.from_preset("pretrain", **{**SIZES, **values, "vit": VisionConfig(**vit)})
    assert [(len(blocks), how) for blocks, how, _ in model.recompute()] == [(model.vision.num_layers, mode)]


def test_a_preset_names_its_weights_and_is_built_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Blip2Qformer.from_preset("pretrain", **SIZES)
    assert model.config.vit_init_from == "eva_vit_g.pth"
    assert (model.config.qformer.init_from, model.config.qformer.width) == ("bert-base-uncased", 16)
    assert Blip2Qformer.presets["pretrain_vitL"]["vit_init_from"] == "clip_vit_L.pth"
    assert Blip2Qformer.presets["coco"]["vit_init_from"] == "eva_vit_g.pth"
    # Nothing was loaded, so nothing may be left out of a checkpoint.
    assert model.frozen_parts() == {}
    with pytest.raises(ConfigError, match=r"no preset 'pretrian'; did you mean 'pretrain'\?"):
        Blip2Qformer.from_preset("pretrian")


def test_a_missing_tower_is_named_with_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Blip2Qformer.from_preset("pretrain", **SIZES)
    with pytest.raises(CheckpointError) as caught:
        model.load_parts()
    text = str(caught.value)
    assert text.startswith(
        "model.vit_init_from: no file 'eva_vit_g.pth', neither as given nor below the data root"
    )
    assert (
        "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth" in text
    )


def test_a_missing_bert_is_named_by_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = SIZES | {"qformer": {**SIZES["qformer"], "init_from": "no-such-bert"}}
    model = Blip2Qformer.from_preset("pretrain", **sizes, vit_init_from=None)
    with pytest.raises(ConfigError, match=r"^model\.qformer\.init_from: no BERT-like model 'no-such-bert'"):
        model.load_parts()


def test_queries_may_begin_as_words_of_the_bert(tmp_path: Path) -> None:
    names = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=28, max_position_embeddings=32, **names)).save_pretrained(tmp_path)
    qformer = {**SIZES["qformer"], "init_from": str(tmp_path), "query_init": "words"}
    sizes = SIZES | {"qformer": qformer, "num_query_token": 5}
    model = Blip2Qformer.from_preset("pretrain", **sizes, vit_init_from=None)
    model.load_parts()
    embedding, queries = model.qformer.embedding, model.qformer.query_tokens[0]
    away = torch.cdist(queries - embedding.position.weight[1:6], embedding.word.weight)
    assert (away.min(dim=1).values < 1e-3).all()  # others are some 0.1 away
    first = queries.clone()
    torch.manual_seed(1)
    model.load_parts()
    assert not torch.equal(model.qformer.query_tokens[0], first)
    with pytest.raises(ConfigError, match=r"query_init: words are those of a BERT; set init_from"):
        QFormer(QFormerConfig(query_init="words"), 2, 16, 30)


def test_cross_attention_may_begin_sharp() -> None:
    def layers(**values: float) -> list[QFormerLayer]:
        torch.manual_seed(0)
        config = QFormerConfig(width=64, depth=2, num_heads=2, mlp_dim=64, max_positions=8, **values)
        return QFormer(config, 2, 64, 30).blocks()

    first, plain = layers(cross_init_std=0.5), layers()
    assert first[1].cross_attn is None  # every second layer has one
    sharp, dull = first[0].cross_attn, plain[0].cross_attn
    assert sharp is not None
    assert dull is not None
    for name, std in {"query": 0.5, "key": 0.5, "value": 0.02, "out": 0.02}.items():
        assert getattr(sharp, name).weight.std().item() == pytest.approx(std, rel=0.1), name
        assert getattr(dull, name).weight.std().item() == pytest.approx(0.02, rel=0.1), name
    own, known = (found[0].self_attn.query.weight for found in (first, plain))
    assert own.std().item() == pytest.approx(known.std().item(), rel=0.1)
    with pytest.raises(ConfigError, match=r"cross_init_std: 0 is not above 0"):
        QFormer(QFormerConfig(cross_init_std=0), 2, 16, 30)


@pytest.mark.parametrize("place", ["working directory", "data root", "BLIP_DATA", "data"])
def test_the_tower_s_file_is_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = {"working directory": tmp_path, "data": tmp_path / "data"}.get(place, tmp_path / "elsewhere")
    folder.mkdir(exist_ok=True)
    if place == "BLIP_DATA":
        monkeypatch.setenv("BLIP_DATA", str(folder))
    sizes = SIZES | {"qformer": {**SIZES["qformer"], "init_from": None}}
    source, model = (Blip2Qformer.from_preset("pretrain", **sizes, vit_precision="fp32") for _ in range(2))
    torch.save(source.vision.vit.state_dict(), folder / "eva_vit_g.pth")
    assert model.frozen_parts() == {}
    model.load_parts(data_root=folder if place == "data root" else None)
    assert torch.equal(model.vision.vit.blocks[0].mlp.fc1.weight, source.vision.vit.blocks[0].mlp.fc1.weight)
    assert model.frozen_parts() == {"vision.": "eva_vit_g.pth"}
