"""The torture set through the real commands: checking and training count it alike, nothing gets outside."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.conftest import Recipe
from tests.e2e.runs import Commands, lines
from tests.e2e.wrong import SHORT
from tests.torture import write_files, write_shard


def listed(path: Path) -> dict[str, str]:
    """Record -> cause, of a list that names each once."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({entry["record"] for entry in entries}) == len(entries)
    return {entry["record"]: entry["cause"] for entry in entries}


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder deep enough for names that lead out of it."""
    folder = tmp_path / "root/some/where/inside"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_checking_counts_each_cause_and_lists_each_record(
    commands: Commands, home: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "file":
        path, causes = write_files(home)
        what, good = [path, "--images", home / "images"], 75
    else:
        _, names, causes = write_shard(home)
        what, good = [home], len(names)
    before, report = everything(tmp_path / "root"), tmp_path / "report.jsonl"
    ended = commands("check", *what, "--report", report, module="blip.data.__main__")
    assert ended.code == 2, ended.output
    assert "of the records are unusable" in ended.output
    assert listed(report) == causes
    [told] = [line for line in ended.output.splitlines() if "unusable: " in line]
    counts = Counter(causes.values())
    assert sorted(told.removeprefix("  unusable:       ").split(", ")) == sorted(
        f"{number} {cause}" for cause, number in counts.items()
    )
    records = f"{good + len(causes)} records" if kind == "file" else " records"
    assert records in ended.output
    assert everything(tmp_path / "root") == before


def test_training_reads_all_that_is_good_and_lists_all_that_is_bad(
    commands: Commands, recipe: Recipe, home: Path, tmp_path: Path
) -> None:
    path, causes = write_files(home)
    before = everything(tmp_path / "root")
    run = {**SHORT, "max_epoch": 1, "max_iters": None, "drop_last": False, "max_bad_ratio": 0.9}
    data = {"path": str(path), "images": str(home / "images"), "format": "json"}
    argv = [f"datasets.scenes.{key}={json.dumps(value)}" for key, value in data.items()]
    folder = tmp_path / "run"
    ended = commands("--cfg", recipe(run=run), *argv, f"run.output_dir={folder}")
    assert ended.code == 0, ended.output
    # Of the same name here as in the recipe.
    assert listed(folder / "skipped.jsonl") == {f"scenes/{n.partition('/')[2]}": c for n, c in causes.items()}
    assert lines(folder)[-1]["step"] == -(-(75 + len(causes)) // 16)
    assert everything(tmp_path / "root") == before
    assert "Traceback" not in ended.output
