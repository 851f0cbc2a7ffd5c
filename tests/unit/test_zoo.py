"""Models by name and from our own weights, with their processors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import blip
from blip.config.files import dump
from blip.config.schema import Config, DatasetConfig, RunConfig
from blip.engine.checkpoint import Checkpoints
from blip.errors import BlipError, CheckpointError, ConfigError, UsageError
from blip.formats.load import load_any
from blip.models.vision import VisionConfig
from blip.predict import model_for
from blip.weights import read_weights, save_safetensors
from tests.reference.small_blip import small_blip

TINY: dict[str, Any] = {
    "vit_model": "vit_base",
    "vit_precision": "fp32",
    "image_size": 32,
    "vit": {"patch_size": 16, "width": 32, "depth": 2, "heads": 2},
    "num_query_token": 3,
    "qformer": {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "max_positions": 40},
    "embed_dim": 8,
    "tokenizer": "scenes",
}
TEXTS = ["a red circle", "two small blue squares"]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and empty caches; returns torch's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    return cache


def tiny(name: str = "blip2", **overrides: Any) -> Any:
    torch.manual_seed(0)
    return blip.load_model(name, pretrained=False, **{**TINY, **overrides})


def samples(size: int = 32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(len(TEXTS), 3, size, size, generator=generator), "text_input": TEXTS}


def same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(
        torch.equal(ours[name], others[name]) and ours[name].dtype == others[name].dtype for name in ours
    )


def without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


# Names


def test_import_blip_loads_neither_torch_nor_any_model() -> None:
    code = "import sys, blip; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers')"
    code += " or m.startswith('blip.')], sorted(set(blip._PUBLIC) - set(dir(blip))))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[] []\n"


def test_every_public_name_exists() -> None:
    assert all(callable(getattr(blip, name)) for name in blip._PUBLIC if name != "model_zoo")
    assert len(blip.model_zoo) > 0


def test_models_are_listed_with_their_types() -> None:
    stage1 = ["pretrain", "pretrain_vitL", "coco"]
    found = blip.list_models("blip2*")
    assert found["blip2"] == found["blip2_feature_extractor"] == found["blip2_image_text_matching"] == stage1
    assert set(found) <= set(blip.list_models())
    assert blip.list_models("no_such*") == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blip.load_model("blip22", pretrained=False), "did you mean 'blip2'?"),
        (lambda: blip.load_model("blip2", "pretrain_vitl", pretrained=False), "mean 'pretrain_vitL'?"),
        (lambda: blip.load_preprocess("blip2", "cocoo"), "did you mean 'coco'?"),
        (lambda: tiny(num_query_tokens=3), "did you mean model.num_query_token?"),
        (lambda: tiny(vit={"widht": 32}), "did you mean model.vit.width?"),
        (lambda: tiny(embed_dim="wide"), "'wide' is not a whole number"),
        (lambda: tiny(dropout=2.0), "model.dropout (argument): 2.0 is not between 0 and 0.9"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert message in str(caught.value)


def test_a_device_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="device 'cdua' cannot be used"):
        tiny(device="cdua")


# Random weights


def test_sections_may_be_dictionaries_or_configurations() -> None:
    plain = tiny()
    typed = tiny(vit=VisionConfig(**TINY["vit"]))
    assert plain.config == typed.config
    assert same(plain.state_dict(), typed.state_dict())


def test_random_weights_read_no_file_of_the_preset_but_those_that_are_asked_for(tmp_path: Path) -> None:
    model = tiny()
    assert (model.config.vit_init_from, model.config.qformer.init_from) == (None, None)
    file = tmp_path / "tower.safetensors"
    save_safetensors(tiny().vision.vit.state_dict(), file)
    torch.manual_seed(1)
    started = blip.load_model("blip2", pretrained=False, **TINY, vit_init_from=str(file))
    assert same(started.vision.state_dict(), model.vision.state_dict())
    assert not torch.equal(started.itm_head.weight, model.itm_head.weight)


def test_models_take_lavis_s_samples() -> None:
    losses = tiny().train()(samples())
    parts = losses.loss_itc + losses.loss_itm + losses.loss_lm
    assert losses.loss.item() == pytest.approx(float(parts.detach()))
    extractor = tiny("blip2_feature_extractor").eval()
    with torch.no_grad():
        assert extractor.extract_features(samples(), mode="image").image_embeds_proj.shape == (2, 3, 8)
        assert extractor.extract_features(samples(), mode="text").text_embeds_proj.shape[::2] == (2, 8)
        assert extractor.extract_features(samples()).multimodal_embeds.shape == (2, 3, 16)
        judge = tiny("blip2_image_text_matching").eval()
        assert judge(samples(), match_head="itm").shape == (2, 2)
        assert judge(samples(), match_head="itc").shape == (2, 1)


# Our own weights


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = tiny("blip2_image_text_matching").eval()
    back = blip.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert type(back) is type(model)
    assert back.config == model.config
    assert not back.training
    assert same(back.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(back(samples()), model(samples()))


def test_the_same_weights_serve_models_of_one_family(tmp_path: Path) -> None:
    model = tiny()
    folder = model.save_pretrained(tmp_path / "model")
    judge = blip.load_model("blip2_image_text_matching", checkpoint=folder)
    assert type(judge).__name__ == "Blip2ImageTextMatching"
    assert judge.training
    assert judge.config.arch == "blip2_image_text_matching"
    assert same(judge.state_dict(), model.state_dict())
    assert blip.from_pretrained(folder, is_eval=False, dropout=0.0).config.dropout == 0


def test_a_model_that_was_built_without_a_name_is_saved_with_one(tmp_path: Path) -> None:
    model = tiny("blip2_image_text_matching")
    model.config.arch = ""
    assert type(blip.from_pretrained(model.save_pretrained(tmp_path / "model"))) is type(model)


def test_frozen_weights_are_fetched_from_where_they_came(tmp_path: Path) -> None:
    tower = tmp_path / "towers" / "tower.safetensors"
    tower.parent.mkdir()
    save_safetensors(tiny().vision.vit.state_dict(), tower)
    model = tiny(vit_init_from=str(tower))
    folder = model.save_pretrained(tmp_path / "model")
    assert without(model.state_dict(), "vision.").keys() == read_weights(folder).keys()
    assert same(blip.from_pretrained(folder).state_dict(), model.state_dict())

    message = r"leaves out vision, which was frozen and came from '.*tower\.safetensors'; set model\.vit"
    with pytest.raises(CheckpointError, match=message):
        load_any(tiny(), folder)

    moved = tower.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"leaves out vision: model\.vit_init_from: no file"):
        blip.from_pretrained(folder)
    again = blip.from_pretrained(folder, vit_init_from=str(moved))
    assert same(again.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="leaves out vision: it was frozen, and nothing says"):
        blip.from_pretrained(folder, vit_init_from=None)


def test_a_tower_that_was_trained_first_comes_back_frozen_in_its_precision(tmp_path: Path) -> None:
    model = tiny(vit_train_steps=5, vit_precision="fp16")
    model.on_step(5)
    assert model.vision.frozen
    back = blip.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert back.vision.frozen
    assert same(back.state_dict(), model.state_dict())


def run_folder(folder: Path, model: Any) -> Path:
    """What a run has written before its end: its configuration and two checkpoints, the first the best."""
    folder.mkdir()
    processor = {"name": "clip_image_eval", "image_size": 32, "mean": [0.5, 0.5, 0.5]}
    section = DatasetConfig(
        vis_processor={"eval": processor}, text_processor={"eval": {"name": "blip_question"}}
    )
    run = RunConfig(task="image_text_pretrain", max_iters=2)
    config = Config(model.config, {"empty": DatasetConfig(), "scenes": section}, run, "mine")
    (folder / "config.yaml").write_text(dump(config))
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, model, {})
    with torch.no_grad():
        model.itm_head.bias += 1
    checkpoints.save(2, model, {})
    checkpoints.mark_best(1)
    return folder


def test_a_run_folder_gives_its_final_model_else_its_best_else_its_newest(tmp_path: Path) -> None:
    model = tiny()
    folder = run_folder(tmp_path / "run", model)
    bias = model.itm_head.bias.detach().clone()
    best = read_weights(folder / "checkpoints" / "step-00000001")["itm_head.bias"]
    assert not torch.equal(best, bias)
    assert torch.equal(blip.from_pretrained(folder).itm_head.bias, best)
    for checkpoint in (folder / "checkpoints" / "last", folder / "checkpoints" / "step-00000002"):
        back = blip.from_pretrained(checkpoint)
        assert same(back.state_dict(), model.state_dict())
        assert back.config == model.config
    (folder / "checkpoints" / "best").unlink()
    assert torch.equal(blip.from_pretrained(str(folder)).itm_head.bias, bias)
    with torch.no_grad():
        model.itm_head.bias += 1
    model.save_pretrained(folder / "model")
    assert torch.equal(blip.from_pretrained(folder).itm_head.bias, bias + 1)


def test_a_run_s_processors_stay_with_its_model(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", tiny())
    vis, text = blip.load_preprocess(blip.from_pretrained(folder))
    assert list(vis) == list(text) == ["eval"]
    assert vis["eval"].mean == [0.5, 0.5, 0.5]
    assert text["eval"]("What is it?") == "what is it?"
    copy = blip.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert blip.load_preprocess(blip.from_pretrained(copy)) == (vis, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no model configuration"),
        ("[]", "is no model configuration"),
        ('{"format": "blip"}', "has no section 'config'"),
        ('{"format": "blip", "config": {"arch": "blip2", "witdh": 3}}', "model.witdh"),
        ('{"format": "blip", "config": {"arch": "blip2", "tokenizer": "${oc.env:HOME}"}}', "recipe is data"),
        ('{"architectures": ["LlavaForConditionalGeneration"]}', "has no counterpart here"),
    ],
)
def test_a_damaged_or_foreign_configuration_is_named(tmp_path: Path, content: str, message: str) -> None:
    folder = tiny().save_pretrained(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(BlipError) as caught:
        blip.from_pretrained(folder)
    assert message in str(caught.value)


def test_bare_weights_need_to_be_told_their_model(tmp_path: Path) -> None:
    model = tiny()
    file = tmp_path / "bare.safetensors"
    save_safetensors(model.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"nothing says which model .* give arch=, one of .*blip2"):
        blip.from_pretrained(file)
    with pytest.raises(CheckpointError, match=r"its tensors do not tell qformer\.num_heads, vit\.heads"):
        blip.from_pretrained(file, arch="blip2")
    heads = {"vit": {"heads": 2}, "qformer": {"num_heads": 2}}
    back = blip.from_pretrained(file, arch="blip2", **heads, tokenizer="scenes")
    assert same(back.state_dict(), model.state_dict())


def test_what_does_not_exist_is_named() -> None:
    with pytest.raises(CheckpointError, match="no weights at 'runs/of/nobody'"):
        blip.from_pretrained("runs/of/nobody")
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' is no file or folder here, and the Hugging"):
        blip.from_pretrained("nobody/nothing")


# Processors


def test_a_model_comes_with_lavis_s_processors_at_its_size() -> None:
    model, vis, text = blip.load_model_and_preprocess(
        "blip2_feature_extractor", is_eval=True, pretrained=False, **TINY
    )
    assert not model.training
    assert [type(vis[s]).__name__ for s in ("train", "eval")] == ["BlipImageTrain", "BlipImageEval"]
    assert text["eval"]("A red, round Ball.") == "a red, round ball"
    image = vis["eval"](Image.new("RGB", (50, 40)))
    with torch.no_grad():
        features = model.extract_features({"image": image[None], "text_input": text["eval"]("A ball.")})
    assert features.multimodal_embeds.shape == (1, 3, 16)


def test_processors_need_no_weights() -> None:
    vis, _ = blip.load_preprocess("blip2", "coco")
    assert vis["eval"].image_size == vis["train"].image_size == 364
    assert blip.load_preprocess("blip2", image_size=56)[0]["eval"].image_size == 56


def test_what_became_of_the_names_stays_with_the_model(tmp_path: Path) -> None:
    folder = tiny().save_pretrained(tmp_path)
    report = blip.from_pretrained(folder, image_size=64).load_report
    assert "tensors loaded from" in report[0]
    assert "1 reshaped (vision.vit.pos_embed)" in report[0]
    assert tiny().load_report == []


def test_parts_that_weights_say_nothing_of_are_named_and_not_used(tmp_path: Path) -> None:
    folder = small_blip("matching", tokenizer="scenes", vocab_size=None).float().save_pretrained(tmp_path)
    assert blip.from_pretrained(folder, arch="blip_image_text_matching").unknown == []
    captioner = blip.from_pretrained(folder, arch="blip_caption")
    assert {name.partition(".")[0] for name in captioner.unknown} == {"lm_head"}
    with pytest.raises(UsageError, match=r"--model blip_caption: the weights have no .* would be random"):
        model_for("caption", "blip_caption", checkpoint=str(folder))
    assert model_for("match", checkpoint=str(folder)).unknown == []
