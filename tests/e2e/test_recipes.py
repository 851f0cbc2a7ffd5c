"""Every recipe that is shipped, and LAVIS's own, against the real models, tasks and processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip.config.load import load_config
from blip.data.catalog.table import names
from blip.train import main

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
LAVIS = ROOT / "tests" / "unit" / "config" / "fixtures" / "lavis" / "pretrain_stage1.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_there_are_recipes() -> None:
    assert "blip2/pretrain_stage1.yaml" in [path.relative_to(ROOT / "configs").as_posix() for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.relative_to(ROOT / "configs").as_posix())
def test_a_shipped_recipe_loads_without_a_remark_and_prints_what_loads_back(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(str(recipe), known_datasets=names())
    assert config.notes == []
    assert main(["--cfg", str(recipe), "--print-config"]) == 0
    printed = Path("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    again = load_config("printed.yaml", known_datasets=names())
    assert again == config


def test_lavis_s_stage_1_loads_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(str(LAVIS), known_datasets=names())
    model = config.model
    assert (model.arch, model.model_type, model.load_pretrained) == ("blip2", "pretrain", False)
    assert (config.run.task, config.run.max_epoch, config.run.warmup_steps) == (
        "image_text_pretrain",
        10,
        5000,
    )
    assert list(config.datasets) == ["coco_caption", "vg_caption"]
    assert main(["--cfg", str(LAVIS), "--print-config"]) == 0
    remarks = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    ignored = [note.partition(": ")[2].partition(":")[0] for note in config.notes]
    assert ignored == [
        f"run.{key}" for key in ("world_size", "dist_url", "distributed", "device", "lr_sched", "output_dir")
    ]
    assert len(remarks) == len(ignored)


def test_a_recipe_s_mistakes_end_the_command_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", str(LAVIS), "--print-config", "model.num_query_tokens=8"]) == 2
    assert "did you mean model.num_query_token?" in capsys.readouterr().err
