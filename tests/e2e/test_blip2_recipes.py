"""BLIP-2's recipes of fine-tuning and evaluation: the paper's values, and small models by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from blip.build import start_of
from blip.config.files import plain
from blip.config.load import load_config
from blip.data.catalog.table import CATALOG, names
from blip.data.locate import available_splits
from blip.evaluate import main as evaluate
from blip.registry import MODELS
from blip.train import main as train
from blip.weights import read_weights
from tests.e2e.runs import ROOT, Commands, lines, train_lines
from tests.e2e.test_blip_evaluation import ANSWERS, CAPTIONED, PICTURES, RECALLS, captions, put, unwritten
from tests.e2e.test_blip_evaluation import questions as asked
from tests.reference.small_stage2 import LLMS

FOLDER = ROOT / "configs" / "blip2"
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
COMMON = {"max_epoch": 5, "warmup_steps": 1000, "init_lr": 1e-5, "weight_decay": 0.05, "beta2": 0.999}
CAPTIONS = {"image_size": 364, "prompt": "a photo of", "qformer_text_input": False}
QUESTIONS = {"image_size": 490, "prompt": "Question: {} Answer:", "qformer_text_input": True}
SIMILAR = {"image_size": 364}

TUNED: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "caption_coco_ft": ("blip2_pretrained_opt2.7b", 256, {"lr_layer_decay": 1}, CAPTIONS),
    "caption_coco_ft_opt6.7b": ("blip2_pretrained_opt6.7b", 256, {"lr_layer_decay": 0.95}, CAPTIONS),
    "caption_coco_ft_flant5xl": ("blip2_pretrained_flant5xl", 256, {"lr_layer_decay": 1}, CAPTIONS),
    "vqav2_ft": ("blip2_pretrained_opt2.7b", 128, {"lr_layer_decay": 0.95}, QUESTIONS),
    "vqav2_ft_opt6.7b": ("blip2_pretrained_opt6.7b", 128, {"lr_layer_decay": 0.9}, QUESTIONS),
    "vqav2_ft_flant5xl": ("blip2_pretrained_flant5xl", 128, {"lr_layer_decay": 0.95}, QUESTIONS),
    "retrieval_coco_ft": ("blip2_pretrained", 224, {"lr_layer_decay": 0.95, "k_test": 128}, SIMILAR),
    "retrieval_coco_ft_vitL": (
        "blip2_pretrained_vitL",
        224,
        {"lr_layer_decay": 1, "init_lr": 5e-6, "beta2": 0.98, "k_test": 128},
        SIMILAR,
    ),
    "retrieval_flickr_ft": ("blip2_finetune_coco", 224, {"lr_layer_decay": 0.95, "k_test": 128}, SIMILAR),
}
"""Recipe -> weights it starts from; batch, other keys of run and of model, as in tables 11 to 13."""

WRITTEN = {"num_beams": 5, "max_len": 30, "min_len": 8, "length_penalty": None, "test_splits": ["val"]}
ASKED = {"num_beams": 5, "max_len": 10, "inference_method": "generate", "test_splits": ["test"]}
TO_OPT = {**ASKED, "prompt": "Question: {} Answer:", "length_penalty": -1.0}
TO_T5 = {**ASKED, "prompt": "Question: {} Short answer:", "length_penalty": None}  # its own is -1
SCORED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "caption_coco_opt2.7b_eval": ("blip2_caption_opt2.7b", 364, {**WRITTEN, "test_splits": ["test"]}),
    "caption_coco_opt6.7b_eval": ("blip2_caption_opt6.7b", 364, {**WRITTEN, "test_splits": ["test"]}),
    "caption_coco_flant5xl_eval": ("blip2_caption_flant5xl", 364, {**WRITTEN, "test_splits": ["test"]}),
    "nocaps_opt2.7b_eval": ("blip2_caption_opt2.7b", 364, WRITTEN),
    "nocaps_opt6.7b_eval": ("blip2_caption_opt6.7b", 364, WRITTEN),
    "nocaps_flant5xl_eval": ("blip2_caption_flant5xl", 364, WRITTEN),
    "nocaps_zeroshot_flant5xl_eval": (
        "blip2_pretrained_flant5xl",
        224,
        {**WRITTEN, "max_len": 80, "min_len": 10, "length_penalty": 1.0},
    ),
    "vqav2_zeroshot_opt_eval": ("blip2_pretrained_opt2.7b", 224, {**TO_OPT, "test_splits": ["val"]}),
    "vqav2_zeroshot_flant5xl_eval": ("blip2_pretrained_flant5xl", 224, {**TO_T5, "test_splits": ["val"]}),
    "okvqa_zeroshot_opt_eval": ("blip2_pretrained_opt2.7b", 224, TO_OPT),
    "okvqa_zeroshot_flant5xl_eval": ("blip2_pretrained_flant5xl", 224, TO_T5),
    "gqa_zeroshot_opt_eval": ("blip2_pretrained_opt2.7b", 224, TO_OPT),
    "gqa_zeroshot_flant5xl_eval": ("blip2_pretrained_flant5xl", 224, TO_T5),
    "ret_coco_eval": ("blip2_finetune_coco", 364, {"k_test": 128, "test_splits": ["test"]}),
    "ret_flickr_eval": ("blip2_finetune_coco", 364, {"k_test": 128, "test_splits": ["test"]}),
}
"""Recipe -> weights it scores, pixels, keys of run: sections 4.1 and 4.4, LAVIS's files."""


def load(name: str, *more: str) -> Any:
    return load_config(f"blip2/{name}", list(more), known_datasets=names())


def test_every_recipe_beside_pre_training_is_here() -> None:
    found = {path.stem for path in FOLDER.glob("*.yaml")}
    elsewhere = ("pretrain", "capfilt")
    assert {name for name in found if not name.startswith(elsewhere)} == {*TUNED, *SCORED}


@pytest.mark.parametrize("name", TUNED)
def test_fine_tuning_has_the_paper_s_values(name: str) -> None:
    weights, batch, run, model = TUNED[name]
    config = load(name)
    tree = plain(config)
    wanted = {**COMMON, **run}
    assert {key: tree["run"][key] for key in wanted} == wanted
    assert 16 * config.run.batch_size_train == batch  # 16 GPUs
    assert {key: tree["model"][key] for key in model} == model
    assert (tree["model"]["freeze_vit"], tree["model"]["drop_path_rate"]) == (False, 0.0)
    assert start_of(config) == config.model.pretrained == f"{LAVIS}{weights}.pth"
    assert start_of(load(name, "model.init_from=output/mine")) == "output/mine"
    assert config.run.valid_splits or config.run.save_minutes  # saved on the way
    about(name, weights)
    for data in config.datasets.values():
        assert data.vis_processor == {
            "train": {"name": "blip2_image_train", "image_size": model["image_size"]},
            "eval": {"name": "blip_image_eval", "image_size": model["image_size"]},
        }
    if "caption" in name:
        assert config.datasets["coco_caption"].text_processor["train"]["prompt"] == f"{model['prompt']} "


@pytest.mark.parametrize("name", SCORED)
def test_evaluation_has_the_paper_s_values_or_lavis_s(name: str) -> None:
    weights, pixels, run = SCORED[name]
    config = load(name)
    assert {key: plain(config)["run"][key] for key in run} == run
    assert config.run.evaluate
    assert start_of(config) == f"{LAVIS}{weights}.pth"
    assert plain(config)["model"]["image_size"] == pixels
    for data in config.datasets.values():
        assert data.vis_processor == {"eval": {"name": "blip_image_eval", "image_size": pixels}}
    about(name, weights)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("caption_coco_ft", 1100),
        ("caption_coco_ft_flant5xl", 1100),
        ("vqav2_ft", 1200),
        ("vqav2_ft_opt6.7b", 1200),
        ("retrieval_coco_ft", 1200),
        ("retrieval_coco_ft_vitL", 474),
    ],
)
def test_as_many_parameters_are_trained_as_in_the_paper(name: str, millions: int) -> None:
    """Tables 3 to 5, which round the larger ones to a tenth of a billion; 30,523 word pieces."""
    config = load(name, "model.vocab_size=30523")
    with torch.device("meta"):
        model = MODELS.get(config.model.arch)(config.model)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert abs(found - millions) < (50 if millions > 1000 else 25)
    scales = {model.lr_scale(n, 0.5) for n, _ in model.named_parameters() if n.startswith("vision.")}
    assert len(scales) == (24 if name.endswith("vitL") else 40)  # a rate for each block, and one below


def about(name: str, weights: str) -> None:
    """The remark above a recipe names its command and its weights."""
    text = (FOLDER / f"{name}.yaml").read_text()
    remark = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert f"--cfg blip2/{name}.yaml" in remark
    assert f"({weights}.pth; a run without" in remark


# Small models. Pictures of the training sets are as good as those of the others.


def questions(split: str) -> list[dict[str, Any]]:
    told = {} if split == "test" else {"answer": ["red", "red", "blue"]}
    return [{**record, **told} for record in asked(split)]


def one_answer(split: str) -> list[dict[str, Any]]:
    return [{**record, "answer": "red"} for record in asked(split)]


RECORDS = {
    **dict.fromkeys(("coco_caption", "coco_retrieval", "flickr30k"), captions),
    **dict.fromkeys(("gqa", "vg_vqa"), one_answer),
    **{"nocaps": unwritten, "coco_vqa": questions, "ok_vqa": asked},
}


def lay_out(root: Path, config: Any) -> None:
    """Files and pictures of a recipe's datasets."""
    for data, section in config.datasets.items():
        row = CATALOG[data]
        for split in available_splits(data, section):
            for file in row.of(split):
                found = RECORDS[data](split)
                if split == "train" and row.kind in ("caption", "retrieval"):  # one caption each there
                    found = [{**record, "caption": record["caption"][0]} for record in found]
                put(root / file, found)
            if split in row.official:
                told: dict[str, Any] = {
                    "annotations": [{"question_id": 500 + i, **ANSWERS} for i in range(PICTURES)]
                }
                if row.kind == "caption":
                    pictures = [{"id": 70 + i, "file_name": f"{i}.png"} for i in range(PICTURES)]
                    said = [{"image_id": 70 + i, "caption": "two stars", "id": i} for i in range(PICTURES)]
                    told = {"images": pictures, "annotations": said}
                put(root / row.official[split], told)
        for file in row.others:
            if not (root / file).exists():
                put(root / file, ["red", "blue"])
        (root / row.images).mkdir(parents=True, exist_ok=True)
        for i in range(PICTURES):
            Image.new("RGB", (32, 32), (80 * i, 40, 200)).save(root / row.images / f"{i}.png")


def sizes(config: Any, pixels: int = 32) -> dict[str, Any]:
    """Keys of the model section that make a recipe's model small, with random parts."""
    found: dict[str, Any] = {
        **{"image_size": pixels, "vit_model": "vit_base", "vit_init_from": None, "vit_precision": "fp32"},
        "vit": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64},
        "qformer": {
            **{"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "max_positions": 48},
            "init_from": None,
        },
        **{"num_query_token": 4, "tokenizer": "scenes"},
    }
    if config.model.arch == "blip2":
        return {**found, "embed_dim": 16}
    kind = config.model.arch.partition("_")[2]
    return {**found, "llm_model": None, "llm": {"sizes": LLMS[kind], "tokenizer": "scenes", "end": None}}


def small(config: Any, root: Path) -> list[str]:
    """Overrides for a small model on what `lay_out` has made."""
    found = [f"model.{key}={json.dumps(value)}" for key, value in sizes(config).items()]
    for data, section in config.datasets.items():
        found += [f"datasets.{data}.vis_processor.{stage}.image_size=32" for stage in section.vis_processor]
    if "apply_lemmatizer" in plain(config)["model"]:
        found.append("model.apply_lemmatizer=false")  # spaCy is not at hand
    return [*found, f"run.data_root={root}", "run.num_workers=0"]


def weights(config: Any, root: Path, **changed: Any) -> Path:
    """A small random model for a recipe to start from, or to score."""
    torch.manual_seed(0)
    values = {**sizes(config), **changed}
    model = MODELS.get(config.model.arch).from_preset(config.model.model_type, **values)
    model.save_pretrained(root / "weights")
    return root / "weights"


@pytest.mark.parametrize("name", [*TUNED, *SCORED])
def test_without_its_weights_a_recipe_says_where_to_put_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config, command = load(name), train if name in TUNED else evaluate
    assert command(["--cfg", f"blip2/{name}", f"run.data_root={tmp_path}"]) == 2
    assert f"run 'blip data prepare {' '.join(config.datasets)}'" in capsys.readouterr().err
    lay_out(tmp_path, config)
    assert command(["--cfg", f"blip2/{name}", *small(config, tmp_path)]) == 2
    message = capsys.readouterr().err
    key = "finetuned" if config.model.finetuned else "pretrained"
    assert f"model.{key}: {start_of(config)} is not on this machine" in message
    assert f"'{tmp_path / 'torch/hub/checkpoints' / Path(str(start_of(config))).name}'" in message


QUICK = ["run.java_metrics=[]", "run.num_beams=2", "run.max_len=6", "run.min_len=1"]
GIVES = {"captioning": CAPTIONED, "vqa": {"overall"}, "gqa": {"acc"}, "retrieval": RECALLS}


@pytest.mark.parametrize(
    "name",
    [
        *("caption_coco_opt2.7b_eval", "nocaps_flant5xl_eval", "nocaps_zeroshot_flant5xl_eval"),
        *("vqav2_zeroshot_opt_eval", "okvqa_zeroshot_flant5xl_eval", "gqa_zeroshot_opt_eval"),
        *("ret_coco_eval", "ret_flickr_eval"),
    ],
)
def test_a_recipe_scores_weights(commands: Commands, tmp_path: Path, name: str) -> None:
    config = load(name)
    lay_out(tmp_path, config)
    more = [*small(config, tmp_path), f"model.init_from={weights(config, tmp_path)}"]
    more += QUICK if config.run.task == "captioning" else []
    folder = tmp_path / "run"
    ended = commands("--cfg", f"blip2/{name}", *more, f"run.output_dir={folder}", module="blip.evaluate")
    assert ended.code == 0, ended.output
    [line] = lines(folder)
    assert line["split"] == config.run.test_splits[0]
    assert line.keys() >= GIVES[config.run.task]
    [file] = (folder / "predictions").glob("*.json")
    assert len(json.loads(file.read_text())) == PICTURES


@pytest.mark.parametrize(
    "name",
    [
        *("caption_coco_ft", "caption_coco_ft_flant5xl", "vqav2_ft", "vqav2_ft_flant5xl"),
        *("retrieval_coco_ft", "retrieval_coco_ft_vitL"),
    ],
)
def test_fine_tuning_trains_the_tower_and_no_language_model(
    commands: Commands, tmp_path: Path, name: str
) -> None:
    """From weights of smaller pictures, and of a Q-Former that reads no questions."""
    config = load(name)
    lay_out(tmp_path, config)
    reads = {"qformer_text_input": False} if "vqa" in name else {}
    start = weights(config, tmp_path, image_size=24, **reads)
    more = [*small(config, tmp_path), f"model.init_from={start}", "run.batch_size_train=2", "run.max_iters=2"]
    more += QUICK if config.run.task == "captioning" else []
    more += ["run.warmup_steps=0", "run.log_freq=1"]
    folder = tmp_path / "run"
    ended = commands("--cfg", f"blip2/{name}", *more, f"run.output_dir={folder}")
    assert ended.code == 0, ended.output
    assert [line["step"] for line in train_lines(folder)] == [1, 2]
    before, after = read_weights(start), read_weights(folder)
    changed = {n for n in after if n not in before or not torch.equal(after[n], before[n])}
    assert {n for n in after if n.startswith("vision.")} <= changed
    assert not {n for n in changed if n.startswith("llm.model.")}
    assert after["vision.vit.pos_embed"].shape[1] == 17  # 3 x 3 patches became 4 x 4
    text_side = {n for n in after if ".text_ffn." in n or n == "qformer.embedding.word.weight"}
    if "vqa" in name:
        assert text_side
        assert not text_side & before.keys()
        [file] = (folder / "submissions").glob("test-*.json")  # the answers to the test questions are secret
        assert [entry["question_id"] for entry in json.loads(file.read_text())] == [500, 501, 502]
    else:
        assert bool(text_side) == (config.model.arch == "blip2")
        assert lines(folder)[-1].keys() >= GIVES[config.run.task]


def test_the_tiny_recipe_of_questions_is_the_same_code_path(
    commands: Commands, data_root: Path, tmp_path: Path
) -> None:
    llm = {"sizes": LLMS["t5"], "tokenizer": "scenes"}
    values = {"llm_model": None, "llm": llm, "image_size": 32}
    values["vit"] = {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "stem_width": 0}
    more = [f"model.{key}={json.dumps(value)}" for key, value in values.items()]
    more += [f"datasets.scenes_vqa.vis_processor.{stage}.image_size=32" for stage in ("train", "eval")]
    more += [f"run.data_root={data_root}", "run.max_iters=2", "run.warmup_steps=0", "run.batch_size_train=4"]
    folder = tmp_path / "run"
    ended = commands("--cfg", "tiny/vqa_ft.yaml", *more, f"run.output_dir={folder}")
    assert ended.code == 0, ended.output
    assert "overall" in lines(folder)[-1]
    assert "qformer.embedding.word.weight" in read_weights(folder)  # the Q-Former reads
