"""The recipes of real parts, with small random parts: on the embedded pictures and on one's own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from blip.engine.checkpoint import fingerprint
from blip.layers.vit import Vit
from blip.models.llm import LLMConfig, build_llm
from blip.models.vision import VisionConfig
from blip.weights import read_weights, save_safetensors
from blip.zoo import from_pretrained
from tests.e2e.runs import ROOT, Commands, lines, train_lines
from tests.reference.small_stage2 import LLMS

VIT = {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
SMALL = [
    "model.image_size=32",
    f"model.vit={VIT}",
    "model.num_query_token=2",
    "run.max_iters=3",
    "run.warmup_steps=1",
    "run.batch_size_train=8",
    "run.log_freq=1",
]
QFORMER = "{width: 32, depth: 2, num_heads: 2, mlp_dim: 64, max_positions: 48"
STAGES = ("pretrain_stage1", "pretrain_stage2", "instruct")


@pytest.fixture(scope="module")
def root(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data root with small parts where run_scripts/laptop_parts.py puts the real ones."""
    place = tmp_path_factory.mktemp("laptop")
    (place / "scenes").symlink_to(data_root / "scenes")
    (place / "parts").mkdir()
    torch.manual_seed(0)
    vit = Vit(VisionConfig(vit_model="vit_base", image_size=48, **VIT).resolve())
    save_safetensors(vit.state_dict(), place / "parts" / "vit_s14.safetensors")
    vocabulary = (ROOT / "blip" / "models" / "scenes_vocab.txt").read_text()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = BertModel(BertConfig(vocab_size=len(vocabulary.splitlines()), max_position_embeddings=48, **sizes))
    bert.save_pretrained(place / "parts" / "minilm")
    (place / "parts" / "minilm" / "vocab.txt").write_text(vocabulary)
    llm = build_llm(None, LLMConfig(sizes=LLMS["llama"], tokenizer="scenes"))
    llm.model.save_pretrained(place / "parts" / "smollm2")
    llm.tokenizer._tokenizer.save_pretrained(place / "parts" / "smollm2")
    return place


def arguments(recipe: str, root: Path, folder: Path) -> list[str]:
    """The recipe's run made small."""
    names = {"instruct": ("scenes_instruct", "some_held_out")}.get(recipe, ("scenes",))
    sizes = [f"datasets.{name}.vis_processor.{s}.image_size=32" for name in names for s in ("train", "eval")]
    reads = ", init_from: parts/minilm" if recipe != "pretrain_stage2" else ""
    own = {"pretrain_stage1": ["run.k_test=10"], "instruct": ["model.max_txt_len=40", "run.max_len=4"]}
    more = [f"model.qformer={QFORMER}{reads}}}", f"run.data_root={root}", f"run.output_dir={folder}"]
    return ["--cfg", f"laptop/{recipe}.yaml", *SMALL, *sizes, *more, *own.get(recipe, ["run.max_len=6"])]


def chain(commands: Commands, root: Path, place: Path, data: dict[str, list[str]]) -> dict[str, Path]:
    """All three, from features that the first command writes; `data` changes datasets of a recipe."""
    stored = place / "features"
    given = [*arguments(STAGES[0], root, stored), *data.get(STAGES[0], [])]
    ended = commands(*given, module="blip.cache_features")
    assert ended.code == 0, ended.output
    runs: dict[str, Path] = {}
    for recipe in STAGES:
        name = "scenes_instruct" if recipe == "instruct" else "scenes"
        start = [f"model.init_from={list(runs.values())[-1]}"] if runs else []
        start += [f"datasets.{name}.features={stored}/scenes", *data.get(recipe, [])]
        ended = commands(*arguments(recipe, root, place / recipe), *start)
        assert ended.code == 0, ended.output
        runs[recipe] = place / recipe
        assert len(train_lines(runs[recipe])) == 3
    return runs


def test_three_stages_of_real_parts(commands: Commands, root: Path, tmp_path: Path) -> None:
    runs = chain(commands, root, tmp_path, {})
    scores = {recipe: lines(folder)[-1] for recipe, folder in runs.items()}
    assert {"txt_r1", "itc_img_r1"} <= scores["pretrain_stage1"].keys()
    assert {"CIDEr", "attr_acc"} <= scores["pretrain_stage2"].keys()
    assert "type_count" in scores["instruct"]
    for recipe in ("pretrain_stage2", "instruct"):  # tower and language model stayed as they were
        state = json.loads((runs[recipe] / "checkpoints" / "last" / "state.json").read_text())
        fresh = from_pretrained(runs[recipe])
        for prefix, source in (("vision.", "parts/vit_s14.safetensors"), ("llm.model.", "parts/smollm2")):
            assert state["frozen"][prefix] == {"source": source, "sha256": fingerprint(fresh, prefix)}
        assert not any(name.startswith(("vision.", "llm.model.")) for name in read_weights(runs[recipe]))


def test_the_same_with_a_folder_of_jpegs_and_captions_in_a_csv(
    commands: Commands, root: Path, tmp_path: Path
) -> None:
    photos, table = tmp_path / "photos", tmp_path / "captions.csv"
    photos.mkdir()
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(10):
            name = f"{number}.jpg"
            Image.new("RGB", (40 + number, 30), (20 * number, 90, 10)).save(photos / name)
            rows.writerows([[name, f"a red moon number {number}"], [name, "there is a small moon"]])
    scenes = [f"datasets.scenes.path={{train: {table}, test: {table}}}", f"datasets.scenes.images={photos}"]
    told = [f"datasets.scenes_instruct.path={table}", f"datasets.scenes_instruct.images={photos}"]
    own = {"pretrain_stage1": scenes, "pretrain_stage2": scenes, "instruct": [*told, "run.test_splits=[]"]}
    runs = chain(commands, root, tmp_path / "out", own)
    assert "attr_acc" not in lines(runs["pretrain_stage2"])[-1]
    [predictions] = (runs["pretrain_stage2"] / "predictions").glob("test*.json")
    assert len(json.loads(predictions.read_text())) == 10
