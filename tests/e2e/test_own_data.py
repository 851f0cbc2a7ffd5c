"""The guide to one's own data and its notebook do what they say."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from webdataset import TarWriter

from blip.config.load import load_config
from blip.data.catalog.table import names
from tests.e2e.runs import ROOT, Commands, lines
from tests.torture import PHOTOGRAPHS, photographs

GUIDE = (ROOT / "run_scripts/own_data.md").read_text()
TINY = {
    "image_size": 32,
    "vit": {"patch_size": 16, "width": 32, "depth": 1, "heads": 2, "mlp_dim": 32},
    "med": {"width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 32},
    "tokenizer": "scenes",
}


def write_list(path: Path) -> None:
    path.write_text(json.dumps([{"image": r["image"], "caption": r["caption"]} for r in photographs()]))


def write_lines(path: Path) -> None:
    pairs = [{"file_name": r["image"], "text": c} for r in photographs() for c in r["caption"]]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def write_table(path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([r["image"], c] for r in photographs() for c in r["caption"])


def write_folder(path: Path) -> None:
    for record in photographs():
        (path / record["image"]).with_suffix(".txt").write_text("\n".join(record["caption"]) + "\n")


def write_shards(path: Path) -> None:
    folder = path.parent
    folder.mkdir()
    for number in range(2):
        with TarWriter(str(folder / f"{number:03d}.tar"), encoder=False) as shard:
            for record in photographs()[number::2]:
                content = (PHOTOGRAPHS / "images" / record["image"]).read_bytes()
                text = json.dumps({"caption": record["caption"]}).encode()
                shard.write({"__key__": Path(record["image"]).stem, "jpg": content, "json": text})


def write_hf(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [str(PHOTOGRAPHS / "images" / r["image"]) for r in photographs()],
        "text": [r["caption"] for r in photographs()],
    }
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.save_to_disk(str(path))


WRITE: dict[str, Callable[[Path], None]] = {
    "pairs.json": write_list,
    "pairs.jsonl": write_lines,
    "pairs.csv": write_table,
    "photos": write_folder,
    "shards/{000..001}.tar": write_shards,
    "hf": write_hf,
}
"""`path` of a line of the guide -> what writes it."""
SECTIONS = [yaml.safe_load(line) for line in re.findall(r"`(datasets: \{.*?\}\})`", GUIDE)]


def test_the_guide_has_a_line_for_each_format() -> None:
    assert {section["datasets"]["mine"]["path"] for section in SECTIONS} == set(WRITE)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["datasets"]["mine"]["path"])
def test_one_line_is_enough(commands: Commands, tmp_path: Path, section: dict[str, Any]) -> None:
    shutil.copytree(PHOTOGRAPHS / "images", tmp_path / "photos")
    path = section["datasets"]["mine"]["path"]
    WRITE[path](tmp_path / path)
    run = {"task": "captioning", "max_iters": 2, "batch_size_train": 6, "num_workers": 0, "log_freq": 1}
    recipe = {"model": {"arch": "blip_caption", **TINY}, **section, "run": {**run, "precision": "fp32"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    ended = commands("--cfg", "mine.yaml", "run.output_dir=run", cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run/skipped.jsonl").exists()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def trainings() -> dict[str, list[str]]:
    """Recipe -> overrides, of the guide's commands that train."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return {words[4]: words[5:] for words in commands if words[2:4] == ["blip.train", "--cfg"]}


@pytest.mark.parametrize("recipe", trainings())
def test_the_guide_s_commands_run_on_such_files(commands: Commands, tmp_path: Path, recipe: str) -> None:
    shutil.copytree(PHOTOGRAPHS / "images", tmp_path / "photos")
    write_table(tmp_path / "pairs.csv")
    for split, part in (("train", slice(0, 8)), ("val", slice(8, 10)), ("test", slice(10, 12))):
        records = [{"image": r["image"], "caption": r["caption"]} for r in photographs()[part]]
        (tmp_path / f"{split}.json").write_text(json.dumps(records))
    asked = [{"image": r["image"], "question": "What is it?", "answer": "a photo"} for r in photographs()]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    small = [
        f"model.{key}={yaml.safe_dump(value, default_flow_style=True)}".strip() for key, value in TINY.items()
    ]
    small = [text.removesuffix("\n...") for text in small]
    small += ["model.pretrained=null", "run.batch_size_train=4", "run.num_workers=0", "run.precision=fp32"]
    if "retrieval" in recipe:
        small += ["model.queue_size=8", "run.k_test=10"]
    ended = commands("--cfg", recipe, *trainings()[recipe], *small, "--dry-run", cwd=tmp_path)
    assert ended.code == 0, ended.output


def test_the_guide_s_commands_are_configurations(tmp_path: Path) -> None:
    found = {
        recipe: list(load_config(recipe, overrides, known_datasets=names()).datasets)
        for recipe, overrides in trainings().items()
    }
    recipes = ("blip/caption_coco_ft.yaml", "blip/retrieval_coco_ft.yaml", "blip/vqav2_ft.yaml")
    assert found == {recipe: ["mine"] for recipe in recipes}
    [recipe] = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.model.arch, list(config.datasets), config.run.max_epoch) == ("blip_caption", ["mine"], 5)


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((ROOT / "run_scripts/own_data.ipynb").read_text())["cells"]
    monkeypatch.chdir(ROOT / "run_scripts")
    before = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(before))
    monkeypatch.setattr(sys, "argv", ["notebook"])
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == []
                exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
    finally:
        shutil.rmtree(space["work"], ignore_errors=True)
    said = capsys.readouterr().out
    assert "train train: 45 records, 9 pictures, 45 captions" in said
    assert '"split": "test"' in said
    assert "CIDEr" in said
