"""LAVIS's own recipes of BLIP have the meaning here that they have there.

The files are fixtures; `test_lavis_files` has what else is asked of them. `MEANING` has the facts in our
terms, from LAVIS's code and model configurations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blip.build import start_of
from blip.config.files import plain
from blip.config.load import load_config
from blip.data.catalog.table import names, row
from tests.e2e.runs import ROOT

FOLDER = ROOT / "tests" / "unit" / "config" / "fixtures" / "lavis" / "blip"
FILES = sorted(FOLDER.rglob("*.yaml"))

BLIP = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP/"
CAPFILT, ANSWERS = BLIP + "model_base_capfilt_large.pth", BLIP + "model_base_vqa_capfilt_large.pth"

COSINE = {"lr_sched": "linear_warmup_cosine_lr", "warmup_steps": 0, "min_lr": 0, "weight_decay": 0.05}
KNOWLEDGE = {**COSINE, "min_lr": 1e-5, "weight_decay": 0.02, "max_epoch": 7, "batch_size_train": 16}
BEAMS = {"num_beams": 3, "max_len": 20, "min_len": 5, "repetition_penalty": None, "length_penalty": None}
RANK = {"inference_method": "rank", "num_ans_candidates": 128, "prompt": ""}
ASK = {"image_size": 480, "vit_drop_path_rate": 0.1}

MEANING: dict[str, dict[str, Any]] = {
    "train/pretrain_14m": {
        "start": None,
        "model": {
            "arch": "blip_pretrain",
            "image_size": 224,
            "queue_size": 57600,
            "alpha": 0.4,
            "max_txt_len": 30,
        },
        "datasets": {
            name: 1.0
            for name in (
                "coco_caption",
                "conceptual_caption_3m",
                "conceptual_caption_12m",
                "vg_caption",
                "sbu_caption",
            )
        },
        "run": {
            "lr_sched": "linear_warmup_step_lr",
            **{
                "init_lr": 3e-4,
                "min_lr": 1e-6,
                "warmup_lr": 1e-6,
                "warmup_steps": 3000,
                "lr_decay_rate": 0.9,
            },
            **{"max_epoch": 20, "batch_size_train": 75, "weight_decay": 0.05, "test_splits": []},
        },
    },
    "train/caption_coco_ft": {
        "start": CAPFILT,
        "model": {"arch": "blip_caption", "image_size": 384, "prompt": "a picture of ", "vit_type": "base"},
        "datasets": {"coco_caption": 1.0},
        "run": {**COSINE, **BEAMS, "init_lr": 1e-5, "max_epoch": 5, "batch_size_train": 32},
    },
    "train/caption_coco_large_ft": {
        "start": BLIP + "model_large.pth",
        "model": {"vit_type": "large", "vit_drop_path_rate": 0.1, "vit_grad_ckpt": True, "vit_ckpt_layer": 5},
        "datasets": {"coco_caption": 1.0},
        "run": {**COSINE, **BEAMS, "init_lr": 2e-6, "max_epoch": 5, "batch_size_train": 16},
    },
    "train/retrieval_coco_ft": {
        "start": CAPFILT,
        "model": {
            "image_size": 384,
            "queue_size": 57600,
            "alpha": 0.4,
            "negative_all_rank": True,
            "max_txt_len": 35,
        },
        "datasets": {"coco_retrieval": 1.0},
        "run": {
            **COSINE,
            **{"init_lr": 2e-5, "weight_decay": 0.04, "max_epoch": 6, "k_test": 256, "batch_size_eval": 128},
            **{"valid_splits": ["val", "test"], "test_splits": ["test"]},
        },
    },
    "train/retrieval_flickr_ft": {
        "start": CAPFILT,
        "model": {"image_size": 384, "queue_size": 57600, "alpha": 0.4, "negative_all_rank": False},
        "datasets": {"flickr30k": 1.0},
        "run": {**COSINE, "init_lr": 1e-5, "max_epoch": 6, "k_test": 128, "batch_size_eval": 64},
    },
    "train/vqav2_ft": {
        "start": CAPFILT,
        "model": ASK,
        "datasets": {"coco_vqa": 1.0, "vg_vqa": 1.0},  # BLIP's own weight of Visual Genome is 0.2
        "run": {
            **COSINE,
            **RANK,
            "init_lr": 2e-5,
            "max_epoch": 10,
            "valid_splits": [],
            "test_splits": ["test"],
        },
    },
    "train/okvqa_ft": {
        "start": ANSWERS,
        "model": ASK,
        "datasets": {"ok_vqa": 1.0},
        "run": {**KNOWLEDGE, **RANK, "task": "vqa", "init_lr": 3e-5, "test_splits": ["test"]},
    },
    "train/aokvqa_ft": {
        "start": ANSWERS,
        "model": ASK,
        "datasets": {"aok_vqa": 1.0},
        "run": {**KNOWLEDGE, **RANK, "task": "aok_vqa", "init_lr": 2e-5, "valid_splits": ["val"]},
    },
    "train/nlvr_ft": {
        "start": CAPFILT,
        "model": {"image_size": 384, "num_classes": 2, "vit_drop_path_rate": 0.0},
        "datasets": {"nlvr": 1.0},
        "run": {**COSINE, "init_lr": 2.5e-5, "max_epoch": 15, "batch_size_train": 16, "batch_size_eval": 64},
    },
    "eval/ret_coco_eval": {
        "start": LAVIS + "blip_coco_retrieval.pth",
        "model": {"image_size": 384},
        "datasets": {"coco_retrieval": 1.0},
        "run": {"k_test": 256, "eval_max_txt_len": 35, "batch_size_eval": 128, "test_splits": ["test"]},
    },
    "eval/ret_flickr_eval": {
        "start": LAVIS + "blip_flickr_retrieval.pth",
        "model": {"image_size": 384},
        "datasets": {"flickr30k": 1.0},
        "run": {"k_test": 128, "batch_size_eval": 64, "test_splits": ["test"]},
    },
    "eval/caption_coco_eval": {
        "start": LAVIS + "blip_coco_caption_base.pth",
        "model": {"image_size": 384, "prompt": "a picture of ", "vit_type": "base"},
        "datasets": {"coco_caption": 1.0},
        "run": {**BEAMS, "report_metric": True, "test_splits": ["test"]},
    },
    "eval/caption_coco_eval_large": {
        "start": BLIP + "model_large_caption.pth",
        "model": {"image_size": 384, "prompt": "a picture of ", "vit_type": "large"},
        "datasets": {"coco_caption": 1.0},
        "run": {**BEAMS, "report_metric": True, "test_splits": ["test"]},
    },
    "eval/nocaps_eval": {
        "start": LAVIS + "blip_coco_caption_base.pth",
        "model": {"image_size": 384, "prompt": "a picture of "},
        "datasets": {"nocaps": 1.0},
        "run": {**BEAMS, "report_metric": False, "test_splits": ["val", "test"]},
    },
    "eval/vqav2_eval": {
        "start": ANSWERS,
        "model": {"image_size": 480},
        "datasets": {"coco_vqa": 1.0},
        "run": {**RANK, "batch_size_eval": 64, "test_splits": ["val"]},
    },
    "eval/okvqa_eval": {
        "start": LAVIS + "blip_okvqa.pth",
        "model": {"image_size": 480},
        "datasets": {"ok_vqa": 1.0},
        "run": {**RANK, "task": "vqa", "batch_size_eval": 16, "test_splits": ["test"]},
    },
    "eval/aokvqa_eval": {
        "start": LAVIS + "blip_aokvqa.pth",
        "model": {"image_size": 480},
        "datasets": {"aok_vqa": 1.0},
        "run": {**RANK, "task": "aok_vqa", "batch_size_eval": 64, "test_splits": ["val", "test"]},
    },
    "eval/nlvr_eval": {
        "start": BLIP + "model_base_nlvr.pth",
        "model": {"image_size": 384, "num_classes": 2},
        "datasets": {"nlvr": 1.0},
        "run": {"task": "multimodal_classification", "batch_size_eval": 64, "test_splits": ["val", "test"]},
    },
}
"""File -> weights it starts from, and values; of datasets, the factor of the answers' weights."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_file_has_its_meaning() -> None:
    assert [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES] == sorted(MEANING)


@pytest.mark.parametrize("name", MEANING)
def test_a_file_of_lavis_means_here_what_it_means_there(name: str) -> None:
    config = load_config(str(FOLDER / f"{name}.yaml"), known_datasets=names())
    meaning, tree = MEANING[name], plain(config)
    for section in ("model", "run"):
        found = {key: tree[section][key] for key in meaning[section]}
        assert found == meaning[section]
    assert {data: part.answer_weight for data, part in config.datasets.items()} == meaning["datasets"]
    assert start_of(config) == meaning["start"]
    assert config.run.evaluate is name.startswith("eval/")
    assert (config.run.precision, config.run.device, config.run.seed) == ("fp32", "auto", 42)
    for data, part in config.datasets.items():
        for options in part.vis_processor.values():
            assert options.get("image_size", 384) == tree["model"]["image_size"]
            assert options.get("min_scale", 0.5) == 0.5
        wanted = [*config.run.test_splits, *([] if config.run.evaluate else config.run.train_splits)]
        assert set(wanted) & row(data).splits.keys()


BLIP2 = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
STAGE1 = FOLDER.parent / "pretrain_stage1.yaml"


@pytest.mark.parametrize("arch", ["blip2", "blip2_feature_extractor", "blip2_image_text_matching"])
@pytest.mark.parametrize(
    ("model_type", "tuned", "pretrained"),
    [
        ("pretrain", None, "blip2_pretrained"),
        ("pretrain_vitL", None, "blip2_pretrained_vitL"),
        ("coco", "blip2_finetune_coco", "blip2_pretrained"),
    ],
)
def test_stage_1_starts_where_lavis_s_model_configurations_say(
    arch: str, model_type: str, tuned: str | None, pretrained: str
) -> None:
    given = [f"model.arch={arch}", f"model.model_type={model_type}"]
    config = load_config(str(STAGE1), given, known_datasets=names())
    assert config.model.finetuned == (tuned and f"{BLIP2}{tuned}.pth")
    assert config.model.pretrained == f"{BLIP2}{pretrained}.pth"
    assert start_of(config) == config.model.finetuned  # the file says load_pretrained: False
    config = load_config(str(STAGE1), [*given, "model.load_pretrained=true", "model.load_finetuned=false"])
    assert start_of(config) == f"{BLIP2}{pretrained}.pth"


TRAINING = ("lr_sched", "init_lr", "min_lr", "warmup_lr", "warmup_steps", "lr_decay_rate", "weight_decay")
TRAINING += ("max_epoch", "batch_size_train", "batch_size_eval")
SCORING = ("k_test", "inference_method", "num_ans_candidates", "batch_size_eval")
WRITING = ("num_beams", "max_len", "min_len", "repetition_penalty", "length_penalty")
AS_SHIPPED = [name for name in MEANING if name.startswith("eval/")]
AS_SHIPPED += [f"train/{name}" for name in ("pretrain_14m", "okvqa_ft", "aokvqa_ft")]


@pytest.mark.parametrize("name", AS_SHIPPED)
def test_our_recipe_of_the_same_name_is_lavis_s(name: str) -> None:
    """The others are BLIP's own, which LAVIS has changed."""
    ours = load_config(f"blip/{name.partition('/')[2]}", known_datasets=names())
    theirs = load_config(str(FOLDER / f"{name}.yaml"), known_datasets=names())
    keys = [key for key in (*SCORING, "task", "precision") if hasattr(theirs.run, key)]
    keys += TRAINING if name.startswith("train/") else ()
    keys += WRITING if theirs.run.task == "captioning" else ()
    assert {key: getattr(ours.run, key) for key in keys} == {key: getattr(theirs.run, key) for key in keys}
    same = ("init_from", "finetuned", "pretrained", "load_finetuned", "load_pretrained")
    models = [{k: v for k, v in plain(config)["model"].items() if k not in same} for config in (ours, theirs)]
    assert models[0] == models[1]
    if name.startswith("eval/"):
        assert start_of(ours) == start_of(theirs)
    assert sorted(ours.datasets) == sorted(theirs.datasets)
