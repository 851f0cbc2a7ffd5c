"""The recipes that score published weights of BLIP: data laid out as the catalogue says, small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip.config.load import load_config
from blip.data.catalog.table import CATALOG, names
from blip.evaluate import main
from blip.models.published import model_zoo
from blip.registry import MODELS
from tests.e2e.runs import Commands, lines

MED = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "max_positions": 512}
VIT = {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
SIZES: dict[str, Any] = {"image_size": 32, "vit": VIT, "med": MED, "tokenizer": "scenes"}
QUEUE = {"queue_size": 8, "embed_dim": 16}

RECALLS = {f"{way}_r{k}" for way in ("txt", "img") for k in (1, 5, 10)}
CAPTIONED = {"Bleu_4", "ROUGE_L", "CIDEr", "agg_metrics"}
TEXTS = ["a red circle above a blue square", "a small green triangle"]
PICTURES = 3


def captions(split: str) -> list[dict[str, Any]]:
    return [{"image": f"{i}.png", "caption": TEXTS, "image_id": i} for i in range(PICTURES)]


def unwritten(split: str) -> list[dict[str, Any]]:
    return [{"image": f"{i}.png", "img_id": 70 + i} for i in range(PICTURES)]


def questions(split: str) -> list[dict[str, Any]]:
    return [{"image": f"{i}.png", "question": "what color?", "question_id": 500 + i} for i in range(PICTURES)]


def choices(split: str) -> list[dict[str, Any]]:
    told = {"direct_answers": ["red"] * 10, "correct_choice_idx": 1}
    more = {"choices": ["red", "blue"], **(told if split == "val" else {})}
    return [{**question, "question_id": f"q{i}", **more} for i, question in enumerate(questions(split))]


def sentences(split: str) -> list[dict[str, Any]]:
    return [{"images": ["0.png", "1.png"], "sentence": TEXTS[i], "label": str(i > 0)} for i in range(2)]


Records = Callable[[str], list[dict[str, Any]]]


def entailments(split: str) -> list[dict[str, Any]]:
    """Names of pictures lack their ending, and labels are words."""
    found = zip(("contradiction", "entailment"), TEXTS, strict=True)
    return [{"image": str(i), "sentence": text, "label": label} for i, (label, text) in enumerate(found)]


RECIPES: dict[str, tuple[Records, dict[str, set[str]], dict[str, Any]]] = {
    "ret_coco_eval": (captions, {"test": RECALLS}, {}),
    "ret_flickr_eval": (captions, {"test": RECALLS}, {}),
    "ret_coco_eval_large": (captions, {"test": RECALLS}, {}),
    "ret_flickr_eval_large": (captions, {"test": RECALLS}, {}),
    "ret_flickr_zeroshot_eval": (captions, {"test": RECALLS}, {}),
    "ret_flickr_zeroshot_eval_large": (captions, {"test": RECALLS}, {}),
    "caption_coco_eval": (captions, {"test": CAPTIONED}, {}),
    "caption_coco_eval_large": (captions, {"test": CAPTIONED}, {}),
    "nocaps_eval": (unwritten, {"val": CAPTIONED}, {"test": [{"image_id": 70 + i} for i in range(PICTURES)]}),
    "vqav2_eval": (questions, {}, {"test": [{"question_id": 500 + i} for i in range(PICTURES)]}),
    "okvqa_eval": (questions, {"test": {"overall"}}, {}),
    "aokvqa_eval": (choices, {"val": {"acc", "mc_acc"}}, {"test": {f"q{i}": {} for i in range(PICTURES)}}),
    "nlvr_eval": (sentences, {"val": {"acc"}, "test": {"acc"}}, {}),
    "snli_ve_eval": (entailments, {"val": {"acc"}, "test": {"acc"}}, {}),
}
"""Recipe -> records of its data, scores by split, what the files for evaluation servers hold."""
UNPUBLISHED = ("snli_ve_eval",)
"""Recipes for which there are no published weights."""

ANSWERS = {"answers": [{"answer": "red"}] * 10, "question_type": "what color", "answer_type": "other"}


def lay_out(root: Path, name: str) -> None:
    """Files and pictures of a recipe's dataset."""
    config = load_config(f"blip/{name}.yaml")
    row = CATALOG[next(iter(config.datasets))]
    for split in config.run.test_splits:
        put(root / row.of(split)[0], RECIPES[name][0](split))
        if split in row.official:
            told = [{"question_id": 500 + i, **ANSWERS} for i in range(PICTURES)]
            if row.kind == "caption":
                told = [{"image_id": 70 + i, "caption": TEXTS[0], "id": i} for i in range(PICTURES)]
            pictures = [{"id": 70 + i, "file_name": f"{i}.png"} for i in range(PICTURES)]
            content = {"images": pictures} if row.kind == "caption" else {}
            put(root / row.official[split], {**content, "annotations": told})
    if row.answer_list:
        put(root / row.answer_list, ["red", "blue", "a circle"])
    (root / row.images).mkdir(parents=True)
    for i in range(PICTURES):
        Image.new("RGB", (32, 32), (80 * i, 40, 200)).save(root / row.images / f"{i}{row.suffix or '.png'}")


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def small(name: str, root: Path) -> list[str]:
    """Overrides that make the recipe's model small and random; it is saved below `root`."""
    config = load_config(f"blip/{name}.yaml")
    values = {**SIZES, **(QUEUE if config.model.arch == "blip_retrieval" else {}), "vit_type": "base"}
    values |= {"vit_grad_ckpt": False}
    model = MODELS.get(config.model.arch).from_preset(config.model.model_type, **values)
    model.save_pretrained(root / "weights")
    data = next(iter(config.datasets))
    sizes = [f"datasets.{data}.vis_processor.eval.image_size=32"]
    sizes += [f"model.{key}={json.dumps(value)}" for key, value in values.items()]
    return [*sizes, f"model.init_from={root / 'weights'}", f"run.data_root={root}", "run.num_workers=0"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_scores_weights_and_writes_what_servers_take(
    commands: Commands, tmp_path: Path, name: str
) -> None:
    lay_out(tmp_path, name)
    folder = tmp_path / "run"
    more = small(name, tmp_path)
    more += ["run.java_metrics=[]"] if "caption" in name or "nocaps" in name else []
    tried = commands("--cfg", f"blip/{name}", *more, "--dry-run", module="blip.evaluate")
    assert tried.code == 0, tried.output
    ended = commands("--cfg", f"blip/{name}", *more, f"run.output_dir={folder}", module="blip.evaluate")
    assert ended.code == 0, ended.output
    _, scores, submitted = RECIPES[name]
    found = {line["split"]: line for line in lines(folder)} if scores else {}
    assert found.keys() == scores.keys()
    assert all(found[split].keys() >= wanted for split, wanted in scores.items())
    files = {path.name.partition("-")[0]: path for path in (folder / "submissions").glob("*.json")}
    assert files.keys() == submitted.keys()
    assert len(list((folder / "predictions").glob("*.json"))) == len(scores.keys() | submitted.keys())
    for split, path in files.items():
        content = json.loads(path.read_text())
        assert len(content) == PICTURES
        if name == "aokvqa_eval":
            assert content.keys() == submitted[split].keys()
            for said in content.values():
                assert said["multiple_choice"] in ("red", "blue")
                assert said["direct_answer"] in ("red", "blue", "a circle")
        else:
            said = "caption" if name == "nocaps_eval" else "answer"
            assert [{k: v for k, v in entry.items() if k != said} for entry in content] == submitted[split]
            assert all(isinstance(entry[said], str) for entry in content)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in UNPUBLISHED])
def test_a_recipe_names_published_weights_and_says_where_to_put_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config = load_config(f"blip/{name}", known_datasets=names())
    assert config.run.evaluate
    assert config.model.finetuned == model_zoo[config.model.arch, config.model.model_type].weights
    assert main(["--cfg", f"blip/{name}", "--dry-run", f"run.data_root={tmp_path}"]) == 2
    assert f"run 'blip data prepare {next(iter(config.datasets))}'" in capsys.readouterr().err
    lay_out(tmp_path, name)
    tiny = [f"model.{key}={json.dumps(value)}" for key, value in {**SIZES, "vit_type": "base"}.items()]
    assert main(["--cfg", f"blip/{name}", "--dry-run", *tiny, f"run.data_root={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert f"model.finetuned: {config.model.finetuned} is not on this machine" in message
    assert "model.init_from=PATH" in message


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_a_recipe_without_published_weights_asks_for_some(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(f"blip/{name}", known_datasets=names())
    assert model_zoo[config.model.arch, config.model.model_type].weights is None
    lay_out(tmp_path, name)
    tiny = [f"model.{key}={json.dumps(value)}" for key, value in SIZES.items()]
    tiny += [f"datasets.{data}.vis_processor.eval.image_size=32" for data in config.datasets]
    assert (
        main(
            [
                "--cfg",
                f"blip/{name}",
                *tiny,
                f"run.data_root={tmp_path}",
                f"run.output_dir={tmp_path / 'run'}",
            ]
        )
        == 2
    )
    assert "model.init_from: nothing says which weights to evaluate" in capsys.readouterr().err
