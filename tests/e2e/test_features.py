"""Features of a frozen tower, written by one command and trained on by another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blip.data.features import part_name, read_part
from tests.e2e.runs import TIMES, Commands, lines
from tests.e2e.test_blip_recipes import MED, options

RECIPES = {"blip_vqa": "scenes_vqa", "blip_nlvr": "scenes_nlvr"}
CACHE = "blip.cache_features"


def arguments(name: str, root: Path, folder: Path) -> list[str]:
    small = options(RECIPES[name], root, folder)
    return ["--cfg", f"tiny/{name}.yaml", *small, f"model.med={{{MED}}}", "model.vit.freeze=true"]


def losses(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(folder)]


@pytest.fixture(scope="module")
def start(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tower the others keep."""
    folder = tmp_path_factory.mktemp("features") / "start"
    ended = commands(*arguments("blip_vqa", data_root, folder), "run.test_splits=[]")
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def stored(
    commands: Commands, data_root: Path, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("features") / "stored"
    begin = f"model.init_from={start}"
    ended = commands(*arguments("blip_vqa", data_root, folder), begin, module=CACHE)
    assert ended.code == 0, ended.output
    assert "scenes_vqa: 64 pictures, " in ended.output
    assert f"left out 0; train with datasets.scenes_vqa.features={folder}/scenes_vqa" in ended.output
    return folder / "scenes_vqa"


@pytest.mark.parametrize("name", RECIPES)
def test_training_on_features_is_training_on_pictures(
    commands: Commands, data_root: Path, start: Path, stored: Path, tmp_path: Path, name: str
) -> None:
    folders = [tmp_path / "pictures", tmp_path / "features", tmp_path / "processes"]
    for folder in folders:
        more = [f"datasets.{RECIPES[name]}.features={stored}"] if folder != folders[0] else []
        world = 2 if folder == folders[2] else 1
        more += ["run.batch_size_train=4", "run.num_workers=1"] if world == 2 else []
        begin = f"model.init_from={start}"
        ended = commands(*arguments(name, data_root, folder), begin, *more, world=world)
        assert ended.code == 0, ended.output
    assert losses(folders[0]) == losses(folders[1])
    for one, two in zip(losses(folders[0])[:2], losses(folders[2])[:2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_a_run_on_features_goes_on_where_it_was(
    commands: Commands, data_root: Path, start: Path, stored: Path, tmp_path: Path
) -> None:
    more = [f"model.init_from={start}", f"datasets.scenes_vqa.features={stored}", "run.test_splits=[]"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert commands(*arguments("blip_vqa", data_root, whole), *more).code == 0
    half = commands(*arguments("blip_vqa", data_root, parts), *more, "run.max_iters=1")
    assert half.code == 0, half.output
    moved = start.with_name("elsewhere")
    start.rename(moved)  # what a run began with need not be there any more
    try:
        ended = commands(*arguments("blip_vqa", data_root, parts), *more, "run.resume=auto")
    finally:
        moved.rename(start)
    assert ended.code == 0, ended.output
    assert losses(parts)[-1]["loss"] == losses(whole)[-1]["loss"]


def test_other_weights_and_trained_towers_are_refused(
    commands: Commands, data_root: Path, start: Path, stored: Path, tmp_path: Path
) -> None:
    given = f"datasets.scenes_vqa.features={stored}"
    other = commands(*arguments("blip_vqa", data_root, tmp_path / "a"), given, "run.seed=7")
    assert "datasets.scenes_vqa.features: they were made by a tower with other weights" in other.refusal()
    begin = f"model.init_from={start}"
    trained = commands(
        *arguments("blip_vqa", data_root, tmp_path / "b"), given, begin, "model.vit.freeze=false"
    )
    assert "set model.vit.freeze: true" in trained.refusal()
    missing = commands(
        *arguments("blip_vqa", data_root, tmp_path / "c"), "datasets.scenes_vqa.features=nowhere"
    )
    assert "datasets.scenes_vqa.features: no complete store of features in" in missing.refusal()
    assert not any((tmp_path / name).exists() for name in "abc")


def test_several_processes_share_the_work_and_it_is_continued(
    commands: Commands, data_root: Path, start: Path, stored: Path, tmp_path: Path
) -> None:
    begin, folder = f"model.init_from={start}", tmp_path / "again"
    shutil.copytree(stored, folder / "scenes_vqa")
    (folder / "scenes_vqa" / "features.json").unlink()
    part = folder / "scenes_vqa" / part_name(0)
    written = part.stat().st_mtime_ns
    ended = commands(*arguments("blip_vqa", data_root, folder), begin, module=CACHE, world=2)
    assert ended.code == 0, ended.output
    assert part.stat().st_mtime_ns == written
    assert read_part(part) == read_part(stored / part_name(0))
    other = commands(*arguments("blip_vqa", data_root, folder), "run.seed=7", module=CACHE)  # another tower
    assert other.code == 0, other.output
    assert part.stat().st_mtime_ns != written


def test_damaged_pictures_are_left_out_listed_and_counted(
    commands: Commands, data_root: Path, start: Path, tmp_path: Path
) -> None:
    root, folder = tmp_path / "data", tmp_path / "features"
    shutil.copytree(data_root, root)
    victim = sorted((root / "scenes" / "images" / "train").glob("*.png"))[3]
    victim.write_bytes(b"no picture")
    begin = f"model.init_from={start}"
    ended = commands(*arguments("blip_vqa", root, folder), begin, module=CACHE)
    assert "scenes_vqa: 63 pictures, " in ended.output
    assert "left out 1" in ended.output
    [line] = (folder / "scenes_vqa" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["cause"] == "unreadable_image"
    given = [begin, f"datasets.scenes_vqa.features={folder}/scenes_vqa", "run.max_bad_ratio=1"]
    run = tmp_path / "run"
    trained = commands(
        *arguments("blip_vqa", root, run),
        *given,
        "run.max_iters=20",
        "run.warmup_steps=1",
        "run.test_splits=[]",
    )
    assert trained.code == 0, trained.output
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert {line["cause"] for line in skipped} == {"no_features"}


def test_a_dry_run_says_how_much_there_would_be_and_writes_nothing(
    commands: Commands, data_root: Path, start: Path, tmp_path: Path
) -> None:
    given = [*arguments("blip_vqa", data_root, tmp_path / "z"), f"model.init_from={start}", "--dry-run"]
    ended = commands(*given, module=CACHE)
    assert ended.code == 0, ended.output
    assert "scenes_vqa: 64 pictures, 0.00 GB" in ended.output
    assert not (tmp_path / "z").exists()


def test_random_views_and_trained_towers_have_no_features(
    commands: Commands, data_root: Path, start: Path, tmp_path: Path
) -> None:
    begin = f"model.init_from={start}"
    name = "datasets.scenes_vqa.vis_processor.train"
    random = [f"{name}={{name: blip_image_train, image_size: 32}}", begin]
    ended = commands(*arguments("blip_vqa", data_root, tmp_path / "x"), *random, module=CACHE)
    assert f"{name}: it changes pictures at random" in ended.refusal()
    trains = commands(
        *arguments("blip_vqa", data_root, tmp_path / "y"), begin, "model.vit.freeze=false", module=CACHE
    )
    assert "blip cache_features: features are of a tower that stays as it is" in trains.refusal()
