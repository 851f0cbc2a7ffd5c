"""The table of official weights: what it holds, how `model_zoo` shows it, where weights are found."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import blip
from blip.config.files import read_yaml
from blip.errors import CheckpointError, ConfigError
from blip.formats import lavis
from blip.formats.load import load_any
from blip.models import published
from blip.models.published import ModelZoo, Score, model_zoo
from blip.registry import MODELS

STAGE1 = ["pretrain", "pretrain_vitL", "coco"]
LAVIS = {
    "blip_caption": ["base_coco", "large_coco"],
    "blip_classification": ["base"],
    "blip_feature_extractor": ["base"],
    "blip_image_text_matching": ["base", "large"],
    "blip_nlvr": ["nlvr"],
    "blip_pretrain": ["base"],
    "blip_retrieval": ["coco", "flickr"],
    "blip_vqa": ["vqav2", "okvqa", "aokvqa"],
    "blip2": STAGE1,
    "blip2_feature_extractor": STAGE1,
    "blip2_image_text_matching": STAGE1,
    "blip2_opt": ["pretrain_opt2.7b", "pretrain_opt6.7b", "caption_coco_opt2.7b", "caption_coco_opt6.7b"],
    "blip2_t5": [
        "pretrain_flant5xl",
        "pretrain_flant5xl_vitL",
        "pretrain_flant5xxl",
        "caption_coco_flant5xl",
    ],
    "blip2_t5_instruct": ["flant5xl", "flant5xxl"],
    "blip2_vicuna_instruct": ["vicuna7b", "vicuna13b"],
}
"""LAVIS's pairs of the family."""
OURS = {("blip_pretrain", "large"), ("blip_retrieval", "large_coco"), ("blip_retrieval", "large_flickr")}
ROWS = [(arch, kind) for arch, kinds in LAVIS.items() for kind in kinds] + sorted(OURS)
BASE = "https://storage.googleapis.com/sfr-vision-language-research/"
TINY: dict[str, Any] = {
    "image_size": 16,
    "vit": {"patch_size": 8, "width": 12, "depth": 2, "heads": 2, "mlp_dim": 20},
    "med": {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "max_positions": 48},
    "tokenizer": "scenes",
}
HUB_ID = "Salesforce/blip-image-captioning-base"
FILE = "blip_coco_caption_base.pth"


# The table


def test_the_table_has_lavis_s_34_pairs_and_ours() -> None:
    assert len(ROWS) - len(OURS) == 34
    rows = read_yaml(Path(published.__file__).parent / published.TABLE, "table")["models"]
    assert {(arch, kind) for arch, kinds in rows.items() for kind in kinds} == set(ROWS)
    used = {key for kinds in rows.values() for row in kinds.values() for key in row}
    assert used == {"weights", "hub", "hub_of", "starts_from", "image_size", "processors", "score"}


@pytest.mark.parametrize(("arch", "kind"), ROWS)
def test_an_entry_says_what_the_model_of_that_name_is(arch: str, kind: str) -> None:
    """Pictures and texts are made as the class makes them, and addresses have the form that LAVIS's have."""
    entry, cls = model_zoo[arch, kind], MODELS.get(arch)
    assert (entry.arch, entry.model_type) == (arch, kind)
    images, texts = blip.load_preprocess(arch, kind)
    assert entry.image_size == images["eval"].image_size == images["train"].image_size
    assert entry.processors == cls.default_processors
    assert type(texts["eval"]).__name__ in ("BlipCaption", "BlipQuestion")
    for address in filter(None, (entry.weights, entry.starts_from)):
        assert address.startswith((f"{BASE}BLIP/models/", f"{BASE}LAVIS/models/"))
        assert address.endswith(".pth")
    assert (cls.published.get(kind), cls.starts.get(kind)) == (entry.weights, entry.starts_from)
    assert (entry.weights is None) == (arch == "blip_classification")
    if entry.hub_id is not None:
        assert entry.hub_id.startswith(("Salesforce/blip", "Salesforce/instructblip"))
    for score in entry.score:
        assert 0 < score.value < 200
        assert score.source.startswith(("P1, table", "P2, table", "P3, table", "LAVIS"))
        assert score.dataset
        assert score.metric


@pytest.mark.parametrize(
    ("arch", "kind", "file", "hub_id", "score"),
    [
        (
            "blip_caption",
            "large_coco",
            "model_large_caption",
            "blip-image-captioning-large",
            Score("COCO test", "CIDEr", 136.7, "P1, table 7"),
        ),
        (
            "blip_vqa",
            "vqav2",
            "model_base_vqa_capfilt_large",
            "blip-vqa-base",
            Score("VQAv2 test-dev", "accuracy", 78.23, "LAVIS"),
        ),
        (
            "blip2_image_text_matching",
            "coco",
            "blip2_finetune_coco",
            "blip2-itm-vit-g-coco",
            Score("COCO test", "IR@1", 68.3, "P2, table 5"),
        ),
        (
            "blip2_opt",
            "pretrain_opt2.7b",
            "blip2_pretrained_opt2.7b",
            "blip2-opt-2.7b",
            Score("VQAv2 val, zero-shot", "accuracy", 53.5, "P2, table 2"),
        ),
        (
            "blip2_vicuna_instruct",
            "vicuna7b",
            "instruct_blip_vicuna7b_trimmed",
            "instructblip-vicuna-7b",
            Score("NoCaps", "CIDEr", 123.1, "P3, table 1"),
        ),
    ],
)
def test_some_entries_by_name(arch: str, kind: str, file: str, hub_id: str, score: Score) -> None:
    entry = blip.model_zoo[arch, kind]
    assert (entry.file, entry.hub_id) == (f"{file}.pth", f"Salesforce/{hub_id}")
    assert score in entry.score


def test_an_entry_is_the_caller_s_own() -> None:
    model_zoo["blip2", "coco"].processors["vis_processor"].clear()
    assert model_zoo["blip2", "coco"].processors["vis_processor"]


# What LAVIS's object does


def test_the_zoo_is_listed_as_in_lavis() -> None:
    listed = dict(model_zoo)
    assert listed == blip.list_models()
    for name, kinds in LAVIS.items():
        assert listed[name][: len(kinds)] == kinds
    assert len(model_zoo) == sum(map(len, listed.values())) >= 34
    lines = str(model_zoo).splitlines()
    assert lines[:3] == ["=" * 50, f"{'Architectures':<30} Types", "=" * 50]
    assert f"{'blip_vqa':<30} vqav2, okvqa, aokvqa" in lines
    assert len(lines) == 3 + len(listed)


def test_names_are_looked_up_with_a_hint() -> None:
    assert ("blip_vqa", "okvqa") in model_zoo
    assert ("blip_vqa", "okvqa2") not in model_zoo
    assert "blip_vqa" in model_zoo
    assert ("no", "model") not in model_zoo
    assert model_zoo.get("blip_caption") == model_zoo["blip_caption", "base_coco"]
    with pytest.raises(ConfigError, match="did you mean 'okvqa'"):
        model_zoo.get("blip_vqa", "okvqa2")
    with pytest.raises(ConfigError, match="did you mean 'blip_vqa'"):
        model_zoo["blip_vqaa", "okvqa"]


def test_a_model_that_the_table_lacks_has_an_entry_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that another package registers."""
    cls = MODELS.get("blip_dual_encoder")
    assert ModelZoo().get("blip_dual_encoder").weights is None
    assert ModelZoo().get("blip_dual_encoder").image_size == 384
    monkeypatch.setattr(cls, "published", {"base": "https://example.org/x.pth"})
    found = ModelZoo().get("blip_dual_encoder", "base")
    assert (found.weights, found.file) == ("https://example.org/x.pth", "x.pth")
    assert found.processors == cls.default_processors


# Where weights are found


@pytest.fixture(autouse=True)
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Empty caches and an empty working directory; returns what the network was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("BLIP_DATA", str(tmp_path / "big"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host))
    return asked


@pytest.fixture(scope="module")
def captioner() -> Any:
    torch.manual_seed(0)
    return blip.load_model("blip_caption", pretrained=False, is_eval=True, **TINY)


def lavis_file(model: Any, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": lavis.table("blip_caption").to_theirs(model.state_dict()).state}, place)
    return place


def snapshot(model: Any, hub: Path, hub_id: str) -> Path:
    """What the hub's client keeps of a repository."""
    cached = hub / f"models--{hub_id.replace('/', '--')}"
    folder = cached / "snapshots" / ("0" * 40)
    blip.to_hf(model).save_pretrained(folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    return folder


def load(**more: Any) -> Any:
    return blip.load_model("blip_caption", "base_coco", is_eval=True, **{**TINY, **more})


def same(ours: Any, other: Any) -> bool:
    a, b = ours.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_that_are_not_here_are_described(tmp_path: Path, attempts: list[Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load()
    for part in (
        f"{BASE}LAVIS/models/BLIP/{FILE} is not on this machine",
        str(tmp_path / "torch" / "hub" / "checkpoints" / FILE),
        str(tmp_path / "big" / "weights" / FILE),
        f"'hf download {HUB_ID}'",
        "other weights, model_base_capfilt_large.pth",
        "checkpoint=PATH",
        "pretrained=False",
    ):
        assert part in str(caught.value)
    assert attempts == []


@pytest.mark.parametrize("place", ["torch/hub/checkpoints", "big/weights", "big"])
def test_a_file_is_found_in_torch_s_cache_and_below_the_data_root(
    place: str, captioner: Any, tmp_path: Path, attempts: list[Any]
) -> None:
    lavis_file(captioner, tmp_path / place / FILE)
    found = load()
    assert same(found, captioner)
    assert found.config.prompt == "a picture of "
    assert attempts == []


def test_a_run_s_data_root_is_looked_into(captioner: Any, tmp_path: Path) -> None:
    lavis_file(captioner, tmp_path / "mine" / "weights" / FILE)
    other = blip.load_model("blip_caption", pretrained=False, **TINY)
    address = model_zoo["blip_caption", "base_coco"].weights
    with pytest.raises(CheckpointError, match=r"big/weights/blip_coco_caption_base\.pth"):
        load_any(other, str(address))
    load_any(other, str(address), tmp_path / "mine")
    assert same(other, captioner)


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_s_cache_comes_last_and_nothing_is_fetched(
    offline: bool,
    captioner: Any,
    tmp_path: Path,
    attempts: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    folder = snapshot(captioner, tmp_path / "hub", HUB_ID)
    found = load()
    assert same(found, captioner)
    assert attempts == []
    message = next(record for record in caplog.records if HUB_ID in record.getMessage())
    assert message.levelno == logging.WARNING
    assert "conversion of other weights, model_base_capfilt_large.pth" in message.getMessage()

    other = blip.load_model("blip_caption", pretrained=False, **TINY)
    lavis_file(other, tmp_path / "big" / "weights" / FILE)
    assert same(load(), other)
    (tmp_path / "big" / "weights" / FILE).unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="is not on this machine"):  # as after a broken download
        load()
    assert attempts == []


def test_what_comes_from_the_hub_s_cache_works_as_lavis_s_does(captioner: Any, tmp_path: Path) -> None:
    """transformers' prompts, and numbers that have been wrong in its files, do not come with the weights."""
    folder = snapshot(captioner, tmp_path / "hub", HUB_ID)
    said = json.loads((folder / "config.json").read_text())
    said["vision_config"]["layer_norm_eps"] = 1e-5
    said["text_config"]["hidden_dropout_prob"] = 0.0
    (folder / "config.json").write_text(json.dumps(said))
    theirs, ours = blip.from_pretrained(HUB_ID, tokenizer="scenes"), load()
    assert (theirs.config.prompt, theirs.config.beam_lengths, theirs.config.dropout) == ("", "new", 0.0)
    assert (ours.config.prompt, ours.config.beam_lengths, ours.config.dropout) == (
        *(captioner.config.prompt, captioner.config.beam_lengths, captioner.config.dropout),
    )
    assert theirs.vision.vit.config.norm_eps == 1e-5
    assert ours.vision.vit.config.norm_eps == captioner.vision.vit.config.norm_eps == 1e-6


def test_offline_a_hub_id_asks_nobody(attempts: list[Any], tmp_path: Path, captioner: Any) -> None:
    with pytest.raises(CheckpointError, match=f"'{HUB_ID}' is no file or folder here"):
        blip.from_pretrained(HUB_ID)
    snapshot(captioner, tmp_path / "hub", HUB_ID)
    assert same(blip.from_pretrained(HUB_ID, tokenizer="scenes"), captioner)
    assert attempts == []


def test_a_frozen_tower_is_found_in_the_folder_of_weights(tmp_path: Path, captioner: Any) -> None:
    file = tmp_path / "big" / "weights" / "tower.pth"
    file.parent.mkdir(parents=True)
    torch.save({"model": captioner.vision.vit.state_dict()}, file)
    found = blip.load_model("blip_caption", pretrained=False, **TINY, vit_init_from="tower.pth")
    assert same(found.vision, captioner.vision)
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError, match=r"no file 'tower\.pth'"):
        blip.load_model("blip_caption", pretrained=False, **TINY, vit_init_from="tower.pth")
