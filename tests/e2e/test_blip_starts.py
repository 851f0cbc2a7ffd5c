"""Where fine-tuning starts from: recipes name published weights, which a run that has begun does not need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip.build import start_of
from blip.config.load import load_config
from blip.data.catalog.table import CATALOG, names
from blip.data.locate import available_splits
from blip.registry import MODELS
from blip.train import main
from blip.weights import read_weights
from tests.e2e.runs import ROOT, Commands, lines, train_lines
from tests.e2e.test_blip_evaluation import (
    PICTURES,
    QUEUE,
    RECALLS,
    SIZES,
    captions,
    entailments,
    put,
    sentences,
)
from tests.e2e.test_blip_recipes import MED, options

BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
STARTS = {
    "caption_coco_ft": "model_base_capfilt_large",
    "caption_coco_large_ft": "model_large",
    "retrieval_coco_ft": "model_base",
    "retrieval_flickr_ft": "model_base",
    "retrieval_coco_large_ft": "model_large",
    "retrieval_flickr_large_ft": "model_large",
    "vqav2_ft": "model_base_capfilt_large",
    "okvqa_ft": "model_base_vqa_capfilt_large",
    "aokvqa_ft": "model_base_vqa_capfilt_large",
    "nlvr_ft": "model_base",
    "snli_ve_ft": "model_base",
}
"""Recipe -> what BLIP's README (retrieval, captions, VQAv2, NLVR2) and LAVIS (the others) start it from;
SNLI-VE, which has no recipe there, starts as NLVR2."""


def test_every_fine_tuning_has_its_start() -> None:
    found = {path.stem for path in (ROOT / "configs/blip").glob("*_ft.yaml")}
    assert found == STARTS.keys()


@pytest.mark.parametrize("name", STARTS)
def test_a_recipe_names_published_weights_and_another_start_wins(name: str) -> None:
    config = load_config(f"blip/{name}", known_datasets=names())
    assert start_of(config) == config.model.pretrained == f"{BLIP}{STARTS[name]}.pth"
    assert start_of(load_config(f"blip/{name}", ["model.init_from=output/mine"])) == "output/mine"
    text = (ROOT / f"configs/blip/{name}.yaml").read_text()
    assert f"{STARTS[name]}.pth; a run" in text  # the remark above the recipe


@pytest.mark.parametrize("name", STARTS)
def test_without_the_weights_a_recipe_prints_but_does_not_train(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert main(["--cfg", f"blip/{name}", "--print-config"]) == 0
    assert f"  pretrained: '{BLIP}{STARTS[name]}.pth'  # blip/{name}.yaml" in capsys.readouterr().out
    config = load_config(f"blip/{name}")
    for data, section in config.datasets.items():  # files are looked for before weights, and read after them
        row = CATALOG[data]
        for split in available_splits(data, section, tmp_path):
            for file in row.of(split):
                put(tmp_path / file, [])
        for file in row.others:
            put(tmp_path / file, ["yes"])
        (tmp_path / row.images).mkdir(parents=True, exist_ok=True)
    sizes = {**SIZES, "vit_type": "base", **({"queue_size": 8} if "retrieval" in name else {})}
    small = [f"model.{key}={json.dumps(value)}" for key, value in sizes.items()]
    assert main(["--cfg", f"blip/{name}", *small, f"run.data_root={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert f"model.pretrained: {BLIP}{STARTS[name]}.pth is not on this machine" in message
    assert f"'{tmp_path / 'torch/hub/checkpoints' / STARTS[name]}.pth'" in message
    assert "model.init_from=PATH" in message


SMALL_TRAINING = {
    "caption_coco_large_ft": (captions, {"CIDEr"}),
    "retrieval_flickr_large_ft": (captions, RECALLS),
    "nlvr_ft": (sentences, {"acc"}),
    "snli_ve_ft": (entailments, {"acc"}),
}
"""Recipe -> records of its data, and scores; of each task that trains on whole records."""


@pytest.mark.parametrize("name", SMALL_TRAINING)
def test_a_recipe_trains_a_small_model_from_another_one_s_weights(
    commands: Commands, tmp_path: Path, name: str
) -> None:
    """From pre-training, as with the published weights: heads that it has not start anew."""
    config, (records, scores) = load_config(f"blip/{name}"), SMALL_TRAINING[name]
    [data] = config.datasets
    row = CATALOG[data]
    for split in ("train", "val", "test"):
        found = records(split)
        if split == "train" and records is captions:
            found = [{**record, "caption": record["caption"][0]} for record in found]
        put(tmp_path / row.of(split)[0], found)
    (tmp_path / row.images).mkdir(parents=True)
    for i in range(PICTURES):
        picture = Image.new("RGB", (32, 32), (80 * i, 40, 200))
        picture.save(tmp_path / row.images / f"{i}{row.suffix or '.png'}")
    sizes = {**SIZES, "vit_type": "base", "vit_ckpt_layer": 1}
    start = (
        MODELS.get("blip_pretrain")
        .from_preset("base", **{**SIZES, **QUEUE})
        .save_pretrained(tmp_path / "start")
    )
    own = QUEUE if config.model.arch == "blip_retrieval" else {}
    more = [f"model.{key}={json.dumps(value)}" for key, value in {**sizes, **own}.items()]
    more += [f"datasets.{data}.vis_processor.{stage}.image_size=32" for stage in ("train", "eval")]
    more += [f"model.init_from={start}", f"run.data_root={tmp_path}", f"run.output_dir={tmp_path / 'run'}"]
    more += ["run.num_workers=0", "run.batch_size_train=2", "run.max_iters=2", "run.log_freq=1"]
    more += ["run.java_metrics=[]"] if config.run.task == "captioning" else []
    ended = commands("--cfg", f"blip/{name}", *more)
    assert ended.code == 0, ended.output
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2]
    assert lines(tmp_path / "run")[-1].keys() >= scores
    before, after = read_weights(start), read_weights(tmp_path / "run")
    assert not torch.equal(before["vision.vit.pos_embed"], after["vision.vit.pos_embed"])


def test_visual_genome_s_answers_weigh_as_in_blip_s_own_recipe() -> None:
    config = load_config("blip/vqav2_ft")
    assert {data: part.answer_weight for data, part in config.datasets.items()} == {
        "coco_vqa": 1.0,
        "vg_vqa": 0.2,
    }
    assert (config.run.valid_splits, config.run.test_splits) == ([], ["test"])  # val is trained on


@pytest.mark.parametrize("name", STARTS)
def test_a_recipe_saves_on_the_way(name: str) -> None:
    run = load_config(f"blip/{name}").run
    assert run.valid_splits or run.save_freq or run.save_minutes


def test_a_run_that_has_begun_does_not_read_the_weights_it_started_from(
    commands: Commands, data_root: Path, tmp_path: Path
) -> None:
    folder, cache = tmp_path / "run", tmp_path / "torch/hub/checkpoints/start.pth"
    sizes = {**SIZES, "vit_type": "base", "vit_grad_ckpt": False}
    model = MODELS.get("blip_caption").from_preset("base_coco", **sizes)
    more = [f"model.med={{{MED}}}", "model.pretrained=https://example.org/start.pth", "run.num_beams=1"]
    more.append("model.vit.stem_width=0")  # as in SIZES, whatever the recipe has
    small = ["--cfg", "tiny/blip_caption.yaml", *options("scenes", data_root, folder), *more]
    env = {"TORCH_HOME": str(tmp_path / "torch")}
    message = commands(*small, env=env).refusal()
    assert "model.pretrained: https://example.org/start.pth is not on this machine" in message

    cache.parent.mkdir(parents=True)
    torch.save(model.state_dict(), cache)
    assert commands(*small, env=env).code == 0
    before = train_lines(folder)
    cache.unlink()
    for how in (["run.resume=auto", "--dry-run"], ["run.resume=auto", "run.max_iters=3"]):
        ended = commands(*small, *how, env=env)
        assert ended.code == 0, ended.output
    assert [line["step"] for line in train_lines(folder)] == [1, 2, 3]
    assert train_lines(folder)[:2] == before

    elsewhere = [f"run.output_dir={tmp_path / 'scored'}", f"run.resume={folder}"]
    shown = []
    for how in ([*elsewhere, "--dry-run"], ["run.resume=auto", "--dry-run"], elsewhere):
        ended = commands(*small, *how, module="blip.evaluate", env=env)
        assert ended.code == 0, ended.output
        shown += [line for line in ended.output.splitlines() if line.startswith("test of scenes")]
    assert len(shown) == 2
    assert shown[0] == shown[1]  # both of the trained weights
    nothing = [*small, f"run.output_dir={tmp_path / 'nothing'}", "run.resume=auto"]
    assert "start.pth is not on this machine" in commands(*nothing, env=env).refusal()
