"""BLIP's recipes have the paper's values; where the paper is silent, those of BLIP's code, or of LAVIS.

Sources: the paper's section 4.1 and table 14; `configs/*.yaml` and the data sets of BLIP's code, which has
the paper's values but for the decay of pre-training's rate (0.9); LAVIS's `projects/blip/train`. Cosines fall
after each epoch there, and at every step here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from blip.config.files import plain
from blip.config.load import load_config
from blip.data.catalog.table import names
from tests.e2e.runs import ROOT

FOLDER = ROOT / "configs" / "blip"
ALWAYS = {"precision": "fp32", "seed": 42}
TRAINED = {"lr_per_epoch": False, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "max_grad_norm": None}
COSINE = {
    **{"lr_sched": "linear_warmup_cosine_lr", "warmup_steps": 0, "min_lr": 0, "weight_decay": 0.05},
    **TRAINED,
}
STEPS = {
    **{"lr_sched": "linear_warmup_step_lr", "warmup_steps": 3000, "warmup_lr": 1e-6, "min_lr": 1e-6},
    **{"weight_decay": 0.05, "max_epoch": 20, **TRAINED},
}
BEAMS = {"num_beams": 3, "max_len": 20, "min_len": 5, "top_p": 0.9}
RANK = {"inference_method": "rank", "num_ans_candidates": 128}

BASE = {"vit_type": "base", "vit_drop_path_rate": 0.0, "dropout": 0.1}
LARGE = {"vit_type": "large", "vit_drop_path_rate": 0.1, "dropout": 0.1}
MOMENTUM = {"queue_size": 57600, "momentum": 0.995, "alpha": 0.4, "embed_dim": 256, "temp": 0.07}
MOMENTUM |= {"min_temp": 0.001, "max_temp": 0.5, "twin_dropout": True, "itc_all_rank": False}
PRETRAIN = {**MOMENTUM, "image_size": 224, "max_txt_len": 30, "alpha_ramp_epochs": 2, "share": "all_but_sa"}
PRETRAIN |= {"negative_all_rank": False, "label_smoothing": 0.1}
RETRIEVAL = {**MOMENTUM, "image_size": 384, "max_txt_len": 35, "alpha_ramp_epochs": 1, "vit_grad_ckpt": True}
CAPTION = {"image_size": 384, "max_txt_len": 40, "prompt": "a picture of ", "label_smoothing": 0.1}
VQA = {"image_size": 480, "max_txt_len": 35, "label_smoothing": 0.1, **BASE, "vit_drop_path_rate": 0.1}
NLVR = {"image_size": 384, "num_classes": 2, "merge_init": "random", "max_txt_len": 512, "use_distill": False}
ENTAILED = {"image_size": 384, "num_classes": 3, "max_txt_len": 40, **BASE}
DISTILLED = {"use_distill": True, "momentum": 0.995, "alpha": 0.4}
QUESTIONS = 50
"""Words of a question, LAVIS's and BLIP's default."""


@dataclass(frozen=True)
class Values:
    """Of a recipe that trains."""

    batch: int
    """On all processes of the command that stands above the recipe."""
    run: dict[str, Any]
    model: dict[str, Any]
    words: int = 50
    """Of a text in training, beside the prompt."""
    crop: float = 0.5
    """Least share of a picture that is seen in training."""
    weights: dict[str, float] = field(default_factory=dict)
    """Factors of answers' weights by dataset, where they are not 1."""


LAYERS = "vit_ckpt_layer"
TRAINING: dict[str, Values] = {
    "pretrain": Values(
        2880, {**STEPS, "init_lr": 3e-4, "lr_decay_rate": 0.85}, {**PRETRAIN, **BASE}, words=30, crop=0.2
    ),
    "pretrain_large": Values(
        2400, {**STEPS, "init_lr": 2e-4, "lr_decay_rate": 0.85}, {**PRETRAIN, **LARGE}, words=30, crop=0.2
    ),
    "pretrain_14m": Values(1200, {**STEPS, "init_lr": 3e-4, "lr_decay_rate": 0.9}, {**PRETRAIN, **BASE}),
    "caption_coco_ft": Values(
        256, {**COSINE, **BEAMS, "init_lr": 1e-5, "max_epoch": 5}, {**CAPTION, **BASE}, words=30
    ),
    "caption_coco_large_ft": Values(
        256,
        {**COSINE, **BEAMS, "init_lr": 2e-6, "max_epoch": 5},
        {**CAPTION, **LARGE, "vit_grad_ckpt": True, LAYERS: 5},
        words=30,
    ),
    "retrieval_coco_ft": Values(
        256,
        {**COSINE, "init_lr": 1e-5, "max_epoch": 6, "k_test": 256},
        {**RETRIEVAL, **BASE, LAYERS: 4, "negative_all_rank": True},
        words=30,
    ),
    "retrieval_coco_large_ft": Values(
        256,
        {**COSINE, "init_lr": 5e-6, "max_epoch": 6, "k_test": 256},
        {**RETRIEVAL, **LARGE, LAYERS: 12, "negative_all_rank": True},
        words=30,
    ),
    "retrieval_flickr_ft": Values(
        256,
        {**COSINE, "init_lr": 1e-5, "max_epoch": 6, "k_test": 128},
        {**RETRIEVAL, **BASE, LAYERS: 4, "negative_all_rank": False},
        words=30,
    ),
    "retrieval_flickr_large_ft": Values(
        256,
        {**COSINE, "init_lr": 5e-6, "max_epoch": 6, "k_test": 128},
        {**RETRIEVAL, **LARGE, LAYERS: 10, "negative_all_rank": False},
        words=30,
    ),
    "vqav2_ft": Values(
        256, {**COSINE, **RANK, "init_lr": 2e-5, "max_epoch": 10}, VQA, QUESTIONS, weights={"vg_vqa": 0.2}
    ),
    "okvqa_ft": Values(
        256,
        {**COSINE, **RANK, "init_lr": 3e-5, "min_lr": 1e-5, "weight_decay": 0.02, "max_epoch": 7},
        VQA,
        QUESTIONS,
    ),
    "aokvqa_ft": Values(
        128,
        {**COSINE, **RANK, "init_lr": 2e-5, "min_lr": 1e-5, "weight_decay": 0.02, "max_epoch": 7},
        VQA,
        QUESTIONS,
    ),
    "nlvr_ft": Values(
        256,
        {**COSINE, "init_lr": 3e-5, "max_epoch": 15},
        {**NLVR, **BASE, "vit_drop_path_rate": 0.1},
        words=40,
    ),
    # LAVIS's values of ALBEF: no one has published BLIP's.
    "snli_ve_ft": Values(256, {**COSINE, "init_lr": 2e-5, "max_epoch": 10}, {**ENTAILED, **DISTILLED}),
}

ONCE = {"image_size": 384, "vit_type": "base"}
ONCE_LARGE = {"image_size": 384, "vit_type": "large"}
EIGHT = {"image_size": 384, "n_frms": 8, "sampling": "starts"}
SIXTEEN = {"image_size": 480, "n_frms": 16, "sampling": "starts"}
EVALUATION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ret_coco_eval": ({"k_test": 256, "eval_max_txt_len": 35}, ONCE),
    "ret_coco_eval_large": ({"k_test": 256, "eval_max_txt_len": 35}, ONCE_LARGE),
    "ret_flickr_eval": ({"k_test": 128, "eval_max_txt_len": 35}, ONCE),
    "ret_flickr_eval_large": ({"k_test": 128, "eval_max_txt_len": 35}, ONCE_LARGE),
    "ret_flickr_zeroshot_eval": ({"k_test": 128, "eval_max_txt_len": 35}, {**ONCE, "itm_token": "enc"}),
    "ret_flickr_zeroshot_eval_large": (
        {"k_test": 128, "eval_max_txt_len": 35},
        {**ONCE_LARGE, "itm_token": "enc"},
    ),
    "caption_coco_eval": (BEAMS, {**ONCE, "prompt": "a picture of "}),
    "caption_coco_eval_large": (BEAMS, {**ONCE_LARGE, "prompt": "a picture of "}),
    "nocaps_eval": (BEAMS, {**ONCE, "prompt": "a picture of "}),
    "vqav2_eval": (RANK, {**ONCE, "image_size": 480}),
    "okvqa_eval": (RANK, {**ONCE, "image_size": 480}),
    "aokvqa_eval": (RANK, {**ONCE, "image_size": 480}),
    "nlvr_eval": ({}, {**ONCE, "num_classes": 2}),
    "snli_ve_eval": ({}, {**ONCE, "num_classes": 3}),
    "retrieval_msrvtt_eval": ({"k_test": 128, "eval_max_txt_len": 35}, ONCE),
    "msrvtt_qa_eval": (RANK, {**ONCE, "image_size": 480}),
    "msvd_qa_eval": (RANK, {**ONCE, "image_size": 480}),
}
"""Recipe -> values of run and of model."""
FRAMES = {"retrieval_msrvtt_eval": EIGHT, "msrvtt_qa_eval": SIXTEEN, "msvd_qa_eval": SIXTEEN}


def differing(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> what it is and what it should be."""
    return {key: (found.get(key), value) for key, value in wanted.items() if found.get(key) != value}


def processes(name: str) -> int:
    """How many the command above a recipe starts."""
    [count] = re.findall(r"--nproc_per_node (\d+) -m blip\.train", (FOLDER / f"{name}.yaml").read_text())
    return int(count)


def test_every_recipe_has_its_values_here() -> None:
    trained = {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("capfilt")}
    assert trained == TRAINING.keys() | EVALUATION.keys()


@pytest.mark.parametrize("name", TRAINING)
def test_training_has_the_paper_s_values(name: str) -> None:
    values, config = TRAINING[name], load_config(f"blip/{name}", known_datasets=names())
    tree = plain(config)
    assert differing({**ALWAYS, **values.run}, tree["run"]) == {}
    assert differing(values.model, tree["model"]) == {}
    run = config.run
    assert processes(name) * run.batch_size_train * run.accum_grad_iters == values.batch
    for data, part in config.datasets.items():
        pictures, texts = part.vis_processor, part.text_processor
        assert {stage["image_size"] for stage in pictures.values()} == {tree["model"]["image_size"]}
        assert pictures["train"]["name"] == "blip_image_train"
        assert pictures["train"].get("min_scale", 0.5) == values.crop
        assert pictures["eval"]["name"] == "blip_image_eval"
        assert texts["train"].get("max_words", 50) == values.words
        assert texts["train"]["name"] == ("blip_question" if "vqa" in name else "blip_caption")
        assert texts["train"].get("prompt", "") == tree["model"].get("prompt", "")
        assert part.answer_weight == values.weights.get(data, 1.0)


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_has_the_paper_s_values(name: str) -> None:
    (run, model), config = EVALUATION[name], load_config(f"blip/{name}", known_datasets=names())
    tree = plain(config)
    assert config.run.evaluate
    assert differing({**ALWAYS, **run}, tree["run"]) == {}
    assert differing(model, tree["model"]) == {}
    [part] = config.datasets.values()
    frames = FRAMES.get(name)
    pictures = {"name": "alpro_video_eval", **frames} if frames else {"name": "blip_image_eval"}
    assert part.vis_processor == {"eval": {**pictures, "image_size": model["image_size"]}}
    assert part.text_processor["eval"].get("max_words", 50) == (40 if name == "retrieval_msrvtt_eval" else 50)
