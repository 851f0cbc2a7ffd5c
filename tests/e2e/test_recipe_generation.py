"""What a recipe says about prompts, beams and lengths is what its model is asked with, family by family."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from blip.config.load import load_config
from blip.data.catalog.table import names
from blip.evaluate import main
from blip.layers.decoding import Decoding
from blip.models.llm_tokenizer import LlmTokenizer
from blip.registry import MODELS
from tests.e2e import test_blip2_recipes, test_blip_evaluation
from tests.reference.small_stage2 import LLMS

FAMILY = {"blip2_opt": "opt", "blip2_t5": "t5", "blip2_t5_instruct": "t5", "blip2_vicuna_instruct": "llama"}
CASES: list[tuple[str, list[str], str, dict[str, Any]]] = [
    ("blip/nocaps_eval", [], "", {"num_beams": 3, "max_length": 20, "min_length": 5, "length_penalty": 1.0}),
    (
        "blip2/vqav2_zeroshot_opt_eval",
        [],
        "Question: what color? Answer:",
        {"num_beams": 5, "max_length": 10, "min_length": 0, "length_penalty": -1.0},
    ),
    (
        "blip2/gqa_zeroshot_flant5xl_eval",
        [],
        "Question: what color? Short answer:",
        {"num_beams": 5, "max_length": 10, "min_length": 0, "length_penalty": -1.0},
    ),
    (
        "blip2/caption_coco_opt2.7b_eval",
        [],
        "a photo of",
        {"num_beams": 5, "max_length": 30, "min_length": 7, "length_penalty": 1.0},
    ),
    (
        "instructblip/zeroshot_gqa",
        [],
        "Question: what color? Short answer:",
        {"num_beams": 5, "max_length": 10, "min_length": 0, "length_penalty": -1.0},
    ),
    (
        "instructblip/zeroshot_nocaps",
        ["model.arch=blip2_vicuna_instruct", "model.model_type=vicuna13b"],
        "A short image description.",
        {"num_beams": 5, "max_length": 80, "min_length": 9, "length_penalty": 1.0},
    ),
]
"""Recipe, override, prompt, what decoding is told: min_length without what a language model starts with."""


def options(recipe: str, override: list[str], root: Path) -> list[str]:
    """Data for a recipe, and what makes its model small and random."""
    if recipe.startswith("blip/"):
        name = recipe.partition("/")[2]
        test_blip_evaluation.lay_out(root, name)
        return test_blip_evaluation.small(name, root)
    config: Any = load_config(recipe, override, known_datasets=names())
    test_blip2_recipes.lay_out(root, config)
    llm = {"sizes": LLMS[FAMILY[config.model.arch]], "tokenizer": "scenes", "end": None}
    tower = {"vit_model": "vit_base", "vit_precision": "fp32", "image_size": 32}
    sizes: dict[str, Any] = {
        **tower,
        "vit": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64},
        "qformer": {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "max_positions": 160},
        **{"num_query_token": 4, "tokenizer": "scenes", "llm_model": None, "llm": llm},
    }
    blank = {"vit_init_from": None, "qformer": {**sizes["qformer"], "init_from": None}}
    torch.manual_seed(0)
    model = MODELS.get(config.model.arch).from_preset(config.model.model_type, **{**sizes, **blank})
    model.save_pretrained(root / "weights")
    found = [f"model.{key}={json.dumps(value)}" for key, value in {**sizes, **blank}.items()]
    found += [f"datasets.{data}.vis_processor.eval.image_size=32" for data in config.datasets]
    return [*found, f"model.init_from={root / 'weights'}", f"run.data_root={root}", "run.num_workers=0"]


@pytest.mark.parametrize(("recipe", "override", "prompt", "wanted"), CASES)
def test_prompt_beams_and_lengths_reach_the_model(
    recipe: str,
    override: list[str],
    prompt: str,
    wanted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules: list[dict[str, Any]] = []
    texts: list[str] = []
    check, raw = Decoding.__post_init__, LlmTokenizer.raw

    def watched(self: Decoding) -> None:
        check(self)
        rules.append(asdict(self))

    def heard(self: LlmTokenizer, given: list[str], *more: Any, **others: Any) -> Any:
        texts.extend(given)
        return raw(self, given, *more, **others)

    more = options(recipe, override, tmp_path)
    monkeypatch.setattr(Decoding, "__post_init__", watched)
    monkeypatch.setattr(LlmTokenizer, "raw", heard)
    quick = ["run.java_metrics=[]"] if "nocaps" in recipe or "caption" in recipe else []
    argv = ["--cfg", f"{recipe}.yaml", *override, *more, *quick, f"run.output_dir={tmp_path / 'run'}"]
    assert main(argv) == 0
    assert {key: rules[0][key] for key in wanted} == wanted
    assert not rules[0]["sample"]
    assert not prompt or prompt in {text.strip() for text in texts}
