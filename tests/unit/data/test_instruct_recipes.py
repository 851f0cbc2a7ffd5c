"""InstructBLIP's catalogue and recipes: which sets are held in, and what each recipe asks of its data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from blip.config.load import load_config
from blip.config.schema import DatasetConfig, ModelConfig
from blip.data.__main__ import main
from blip.data.catalog.instruct import ALIASES, GROUPS, MEMBERS
from blip.data.catalog.table import CATALOG, instructblip, names
from blip.data.instruct import unfit
from blip.data.locate import MissingData, available_splits, require_files
from blip.registry import MODELS, TASKS
from blip.templates import resolve

FOLDER = Path(__file__).parents[3] / "configs" / "instructblip"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))


@dataclass
class StubConfig(ModelConfig):
    image_size: int = 224
    prompt: str = ""


class Stub:
    config_class = StubConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {name: {} for name in ("flant5xl", "vicuna7b")}
    published: ClassVar[dict[str, str]] = dict.fromkeys(presets, "https://example.org/weights.pth")
    starts = published


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODELS, "_searched", True)
    stubs: dict[str, Any] = dict.fromkeys(("blip2_t5_instruct", "blip2_vicuna_instruct"), Stub)
    monkeypatch.setattr(MODELS, "_classes", stubs)


def test_half_of_the_26_sets_is_held_in() -> None:
    assert len(GROUPS) == 11
    assert (len(instructblip()), len(instructblip(True)), len(instructblip(False))) == (26, 13, 13)
    assert set(instructblip()) <= set(CATALOG)
    seen = {member.group for member in MEMBERS.values() if member.held_in}
    unseen = set(GROUPS) - seen
    assert unseen == {
        "visual reasoning",
        "video question answering",
        "visual conversational question answering",
        "image classification",
    }
    assert all("train" in CATALOG[name].splits for name in instructblip(True))
    assert all({"val", "test"} & set(CATALOG[name].splits) for name in instructblip(False))


@pytest.mark.parametrize("name", names())
def test_every_list_of_the_catalogue_fits_its_records(name: str) -> None:
    row = CATALOG[name]
    if row.templates:
        assert unfit(resolve(row.templates), row.kind) == ""
    assert set(row.ocr) <= set(row.splits)


def test_lavis_s_names_for_instructions_are_the_same_files() -> None:
    for alias, name in ALIASES.items():
        assert CATALOG[alias].same_as == name
        assert CATALOG[alias].splits == CATALOG[name].splits


def test_the_list_of_datasets_says_what_is_held_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLIP_DATA", str(tmp_path))
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[0]: line.split()[3] for line in lines if " held " in line}
    assert set(told) == set(instructblip())
    assert (
        lines[[line.split()[:1] for line in lines].index(["visdial"]) - 1] == f"{MEMBERS['visdial'].group}:"
    )
    assert Counter(told.values()) == {"in": 13, "out": 13}
    assert not any(line.split()[:1] == ["coco_caption_instruct"] for line in lines)


def load(recipe: str) -> Any:
    return load_config(str(FOLDER / recipe), known_datasets=names())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_loads_without_a_remark_and_its_data_serve_its_task(recipe: str) -> None:
    config = load(recipe)
    assert config.notes == []
    task = TASKS.get(config.run.task)
    text = (FOLDER / recipe).read_text()
    assert f"--cfg instructblip/{recipe}" in text
    for name, section in config.datasets.items():
        row = CATALOG[name]
        kind = "caption" if row.kind == "retrieval" else row.kind
        wanted = task.data_kind
        assert wanted in {"instruct", {"caption": "caption", "vqa": "vqa"}.get(kind, "")}
        if section.templates:
            assert unfit(resolve(section.templates), kind) == ""
        splits = set(available_splits(name, section))
        assert splits & {*config.run.train_splits, *config.run.valid_splits, *config.run.test_splits}
        assert {options.get("image_size") for options in section.vis_processor.values()} == {224}


@pytest.mark.parametrize("recipe", ["train_flant5xl.yaml", "train_vicuna7b.yaml"])
def test_the_training_recipes_take_the_sets_that_are_held_in(recipe: str) -> None:
    config = load(recipe)
    assert set(config.datasets) == set(instructblip(True))
    assert config.run.sampling == "sqrt"
    ratios = {name: d.sample_ratio for name, d in config.datasets.items() if d.sample_ratio is not None}
    assert ratios["ok_vqa"] > 1 > ratios["aok_vqa"]  # section 2.4
    assert len(ratios) == 2
    per_gpu = {"train_flant5xl.yaml": 12, "train_vicuna7b.yaml": 8}[recipe]
    run = config.run
    assert (run.batch_size_train, run.max_iters, run.eval_freq, run.warmup_steps) == (
        per_gpu,
        60000,
        3000,
        1000,
    )
    judged = [n for n, d in config.datasets.items() if "val" in available_splits(n, d)]
    assert judged == ["coco_caption", "aok_vqa"]
    assert run.monitor == "aok_vqa/acc"


def test_every_set_that_is_held_out_has_a_recipe() -> None:
    evaluated = [
        name for recipe in RECIPES if recipe.startswith("zeroshot") for name in load(recipe).datasets
    ]
    assert set(instructblip(False)) <= set(evaluated)


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_that_are_missing_are_named_with_what_to_do(recipe: str, tmp_path: Path) -> None:
    config = load(recipe)
    splits = config.run.test_splits or config.run.train_splits
    wanted = [
        (name, section, split)
        for split in splits
        for name, section in config.datasets.items()
        if split in available_splits(name, section)
    ]
    with pytest.raises(MissingData) as caught:
        require_files(wanted, tmp_path)
    for name, _, split in wanted:
        assert CATALOG[name].of(split)[0] in str(caught.value)
        assert f" {name}" in str(caught.value).partition("run 'blip data prepare")[2]


def test_a_section_may_name_other_files_of_a_named_set() -> None:
    section = DatasetConfig(
        path={"val": "gqa/annotations/testdev_balanced_questions.json"}, images="gqa/images"
    )
    assert available_splits("gqa", section) == ["val"]
