"""LAVIS's own recipes of BLIP-2 have the meaning here that they have there.

The files are fixtures, stage 1's apart; `test_lavis_files` has what else is asked of them. `MEANING` has the
facts in our terms, from LAVIS's code and model configurations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blip.build import start_of
from blip.config.files import plain
from blip.config.load import load_config
from blip.data.catalog.table import names
from tests.e2e.runs import ROOT
from tests.e2e.test_lavis_recipes import BLIP2, SCORING, TRAINING, WRITING

FOLDER = ROOT / "tests" / "unit" / "config" / "fixtures" / "lavis" / "blip2"
FILES = sorted(FOLDER.rglob("*.yaml"))

COSINE = {"init_lr": 1e-5, "min_lr": 0, "warmup_lr": 1e-8, "warmup_steps": 1000, "weight_decay": 0.05}
COCO = {"num_beams": 5, "max_len": 30, "min_len": 8, "repetition_penalty": None, "length_penalty": None}
CAPTION = {"image_size": 364, "prompt": "a photo of", "vit_precision": "fp32", "freeze_vit": False}
ASK = {"num_beams": 5, "max_len": 10, "min_len": 1, "inference_method": "generate", "length_penalty": None}
ASK |= {"prompt": "Question: {} Short answer:", "batch_size_eval": 64}
FROZEN = {"image_size": 224, "prompt": "", "vit_precision": "fp16", "freeze_vit": True}
OPT = {"llm_model": "facebook/opt-2.7b"}
T5 = {"llm_model": "google/flan-t5-xl"}
OUT_OF_DOMAIN = {"num_beams": 5, "max_len": 80, "min_len": 10, "length_penalty": 1.0, "valid_splits": ["val"]}
SIMILAR = {"image_size": 364, "freeze_vit": False}

MEANING: dict[str, dict[str, Any]] = {
    "train/pretrain_stage2": {
        "start": "blip2_pretrained",
        "model": {**FROZEN, **OPT},
        "datasets": ["coco_caption", "vg_caption"],
        "run": {"init_lr": 1e-4, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 2000, "max_epoch": 10},
    },
    "train/caption_coco_ft": {
        "start": "blip2_pretrained_opt2.7b",
        "model": {**CAPTION, **OPT, "use_grad_checkpoint": True},
        "datasets": ["coco_caption"],
        "run": {**COSINE, **COCO, "max_epoch": 5, "batch_size_train": 16, "test_splits": ["test"]},
    },
    "train/retrieval_coco_ft": {
        "start": "blip2_pretrained",
        "model": SIMILAR,
        "datasets": ["coco_retrieval"],
        "run": {**COSINE, "lr_layer_decay": 0.95, "k_test": 128, "valid_splits": ["test"]},
    },
    "eval/caption_coco_opt2.7b_eval": {
        "start": "blip2_caption_opt2.7b",
        "model": {**CAPTION, **OPT},
        "datasets": ["coco_caption"],
        "run": {**COCO, "batch_size_eval": 16, "test_splits": ["test"]},
    },
    "eval/caption_coco_opt6.7b_eval": {
        "start": "blip2_caption_opt6.7b",
        "model": {**CAPTION, "llm_model": "facebook/opt-6.7b"},
        "datasets": ["coco_caption"],
        "run": {**COCO, "batch_size_eval": 16, "test_splits": ["test"]},
    },
    "eval/caption_nocaps_out_domain_flant5xl_eval": {
        "start": "blip2_pretrained_flant5xl",
        "model": {**FROZEN, **T5},
        "datasets": ["nocaps"],
        "run": OUT_OF_DOMAIN,
    },
    "eval/caption_nocaps_out_domain_flant5xxl_eval": {
        "start": "blip2_pretrained_flant5xxl",
        "model": {**FROZEN, "llm_model": "google/flan-t5-xxl"},
        "datasets": ["nocaps"],
        "run": OUT_OF_DOMAIN,
    },
    "eval/vqav2_zeroshot_opt_eval": {
        "start": "blip2_pretrained_opt2.7b",
        "model": {**FROZEN, **OPT},
        "datasets": ["coco_vqa"],
        "run": {**ASK, "test_splits": ["val"]},
    },
    "eval/vqav2_zeroshot_flant5xl_eval": {
        "start": "blip2_pretrained_flant5xl",
        "model": {**FROZEN, **T5},
        "datasets": ["coco_vqa"],
        "run": {**ASK, "test_splits": ["val"]},
    },
    "eval/okvqa_zeroshot_flant5xl_eval": {
        "start": "blip2_pretrained_flant5xl",
        "model": {**FROZEN, **T5, "apply_lemmatizer": True},
        "datasets": ["ok_vqa"],
        "run": {**ASK, "test_splits": ["test"]},
    },
    "eval/gqa_zeroshot_flant5xl_eval": {
        "start": "blip2_pretrained_flant5xl",
        "model": {**FROZEN, **T5},
        "datasets": ["gqa"],
        "run": {**ASK, "task": "gqa", "test_splits": ["val"]},
    },
    "eval/ret_coco_eval": {
        "start": "blip2_finetune_coco",
        "model": SIMILAR,
        "datasets": ["coco_retrieval"],
        "run": {"k_test": 128, "eval_max_txt_len": 35, "batch_size_eval": 32, "test_splits": ["test"]},
    },
    "eval/ret_flickr_eval": {
        "start": "blip2_finetune_coco",
        "model": SIMILAR,
        "datasets": ["flickr30k"],
        "run": {"k_test": 128, "eval_max_txt_len": 35, "batch_size_eval": 32, "test_splits": ["test"]},
    },
}
"""File -> weights it starts from, and values."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(name: str) -> Any:
    return load_config(str(FOLDER / f"{name}.yaml"), known_datasets=names())


def test_every_file_has_its_meaning() -> None:
    assert {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FILES} == MEANING.keys()


@pytest.mark.parametrize("name", MEANING)
def test_a_file_of_lavis_means_here_what_it_means_there(name: str) -> None:
    config = load(name)
    meaning, tree = MEANING[name], plain(config)
    for section in ("model", "run"):
        found = {key: tree[section][key] for key in meaning[section]}
        assert found == meaning[section]
    assert list(config.datasets) == meaning["datasets"]
    assert start_of(config) == f"{BLIP2}{meaning['start']}.pth"
    assert config.run.evaluate is name.startswith("eval/")
    assert (config.run.precision, config.run.device, config.run.seed) == ("auto", "auto", 42)
    for part in config.datasets.values():
        for options in part.vis_processor.values():
            assert options["image_size"] == tree["model"]["image_size"]


OWN = {
    "vqav2_zeroshot_opt_eval": {"prompt", "length_penalty"},  # the paper's
}
"""Recipe -> keys that differ from LAVIS's on purpose."""
SHARED = [name for name in MEANING if "nocaps" not in name and "pretrain" not in name]


@pytest.mark.parametrize("name", SHARED)
def test_our_recipe_of_the_same_name_is_lavis_s(name: str) -> None:
    own = name.partition("/")[2]
    ours, theirs = load_config(f"blip2/{own}", known_datasets=names()), load(name)
    keys = [key for key in (*SCORING, *WRITING, "prompt", "task", "precision") if hasattr(theirs.run, key)]
    keys += (*TRAINING, "lr_layer_decay", "beta2") if name.startswith("train/") else ()
    different = {key for key in keys if getattr(ours.run, key) != getattr(theirs.run, key)}
    assert different == OWN.get(own, set())
    same = ["init_from", "finetuned", "pretrained", "load_finetuned", "load_pretrained"]
    same += [] if name.startswith("train/") else ["use_grad_checkpoint"]  # there is no backward pass
    models = [{k: v for k, v in plain(config)["model"].items() if k not in same} for config in (ours, theirs)]
    assert models[0] == models[1]
    assert start_of(ours) == start_of(theirs)
    assert list(ours.datasets) == list(theirs.datasets)
    for data, part in theirs.datasets.items():
        stages = ("train", "eval") if name.startswith("train/") else ("eval",)
        for kind in ("vis_processor", "text_processor"):
            found = {stage: getattr(ours.datasets[data], kind)[stage] for stage in stages}
            assert found == {stage: getattr(part, kind)[stage] for stage in stages}
