"""Data that is missing, of another kind or damaged ends the command with code 2 and one paragraph about it.

A little damage is left out, counted and listed; more than `run.max_bad_ratio` ends the run on all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Recipe
from tests.e2e.runs import Commands
from tests.e2e.wrong import SHORT, cut, harmed, paragraph

SHARDS = "scenes/shards/train-{:05d}.tar"


# What stands in data


class Own:
    """A user's own dataset: a list of records, and the recipe's command line to train on it."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.records = json.loads((root / "scenes/annotations/train.json").read_text())

    def __call__(self, content: Any, name: str = "own.json", **keys: Any) -> list[str]:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        section = {"path": str(path), "images": str(self.root / "scenes"), **keys}
        return [f"datasets.scenes.{key}={json.dumps(value)}" for key, value in section.items()]


OWN: dict[str, tuple[Callable[[Own], list[str]], list[str]]] = {
    "missing annotation file": (
        lambda own: [*own(own.records), f"datasets.scenes.path={own.folder}/onw.json"],
        [
            "datasets.scenes.path: no file",
            "onw.json'; correct datasets.scenes.path",
            "did you mean 'own.json'?",
        ],
    ),
    "missing image folder": (
        lambda own: own(own.records, images="pictures"),
        ["datasets.scenes.images: no folder 'pictures' under", "give the folder that"],
    ),
    "wrong image folder": (
        lambda own: own(own.records, images=str(own.folder)),
        [
            "none of the first 20 pictures is there, not even",
            "the folder that holds 'images/train/000000.png'",
        ],
    ),
    "empty list": (lambda own: own([]), ["datasets.scenes.path: ", "own.json holds no records"]),
    "empty file": (lambda own: own(""), ["own.json: neither a JSON list nor an object; the file is empty"]),
    "no JSON": (lambda own: own("image, caption"), ["own.json: neither a JSON list", "it starts with 'i'"]),
    "truncated JSON": (
        lambda own: own(json.dumps(own.records)[:2000]),
        ["datasets.scenes.path: ", "own.json, line 1: not valid JSON", "in record", "is the file complete?"],
    ),
    "list of numbers": (lambda own: own([1, 2, 3]), ["own.json: no usable record among the first 3"]),
    "unknown kind of file": (
        lambda own: own("image caption", "own.xyz"),
        ["datasets.scenes.path: ", "own.xyz: no known kind of annotation file; set the dataset's format to"],
    ),
    "missing caption column": (
        lambda own: own([{"image": r["image"], "capion": r["caption"]} for r in own.records]),
        ["own.json has no column 'caption', only image, capion", "columns: {caption: ...}", "mean 'capion'?"],
    ),
    "missing image column": (
        lambda own: own([{"img": r["image"], "caption": r["caption"]} for r in own.records]),
        ["own.json has no column 'image', only img, caption", "columns: {image: ...}", "did you mean 'img'?"],
    ),
    "column that the file has not": (
        lambda own: own(own.records, columns={"caption": "captoin"}),
        ["no column 'captoin', which datasets.scenes.columns.caption names", "did you mean 'caption'?"],
    ),
    "column that we have not": (
        lambda own: own(own.records, columns={"captoin": "caption"}),
        ["datasets.scenes.columns.captoin: no column of ours", "did you mean 'caption'?"],
    ),
    "empty captions": (
        lambda own: own([{**r, "caption": ""} for r in own.records]),
        [
            "datasets.scenes: 21 records in a row cannot be read (21 no_caption",
            "check datasets.scenes.columns",
        ],
    ),
    "missing shards": (
        lambda own: ["datasets.scenes.path=scenes/shards/train-{90..99}.tar"],
        ["datasets.scenes.path: shards", "none of 10 files is there", "train-90.tar'; correct the path"],
    ),
    "some missing shards": (
        lambda own: ["datasets.scenes.path=scenes/shards/train-{00030..00034}.tar"],
        ["3 of 5 files are missing, the first is", "train-00032.tar'; complete them, or take what is there"],
    ),
    "shards of a url": (
        lambda own: ["datasets.scenes.path=https://example.org/{0..9}.tar"],
        [
            "datasets.scenes.path: 'https://example.org/{0..9}.tar' is not on this machine; to fetch",
            "set datasets.scenes.remote=true, or copy them to a disk",
        ],
    ),
    "batch larger than the shards": (
        lambda own: ["datasets.scenes.path=scenes/shards/train-*.tar", "run.batch_size_train=1000"],
        ["run.batch_size_train: scenes has 64 samples, fewer than a batch of it (1000 rows on all ranks)"],
    ),
    "ratios of some": (
        lambda own: ["datasets.scenes_shards.sample_ratio=1"],
        ["datasets.scenes.sample_ratio: not given, but given for scenes_shards; give every dataset"],
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_data_that_cannot_be_used_is_named_with_what_to_do(
    commands: Commands, recipe: Recipe, data_root: Path, tmp_path: Path, case: str
) -> None:
    make, told = OWN[case]
    argv = make(Own(tmp_path, data_root))
    text = paragraph(commands("--cfg", recipe(run=SHORT), *argv, f"run.output_dir={tmp_path / 'run'}"))
    assert [words for words in told if words not in text] == [], text
    assert not (tmp_path / "run").exists()


# Damaged data: a little of it is left out and listed, too much of it ends the run


@pytest.mark.parametrize("world", [1, 2])
def test_truncated_pictures_end_a_run_above_the_ratio_on_all_ranks(
    commands: Commands, recipe: Recipe, data_root: Path, tmp_path: Path, world: int
) -> None:
    root, folder = harmed(data_root, tmp_path / "data"), tmp_path / "run"
    for number in (3, 20, 41, 50):  # 8 of 128 captions
        cut(root / f"scenes/images/train/{number:06d}.png")
    run = {**SHORT, "batch_size_train": 16 // world, "max_epoch": 3, "max_iters": None, "log_freq": 8}
    places = [f"run.data_root={root}", f"run.output_dir={folder}"]
    ended = commands("--cfg", recipe(run=run), *places, world=world)
    assert ended.codes == [2] * world
    assert "Traceback" not in ended.output
    told = "8 of 136 records cannot be read (scenes: 8 truncated_image), more than run.max_bad_ratio=0.05"
    listed = f"they are listed in {folder}/skipped.jsonl; mend the data"
    assert f"error: {told} allows; {listed}" in ended.output
    lines = [line for path in folder.glob("skipped*.jsonl") for line in path.read_text().splitlines()]
    assert {json.loads(line)["record"] for line in lines} == {
        f"scenes/{2 * number + which}" for number in (3, 20, 41, 50) for which in (0, 1)
    }
    # The first of three epochs is enough to tell.
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [8]


def test_truncated_pictures_below_the_ratio_are_left_out_and_listed(
    commands: Commands, recipe: Recipe, data_root: Path, tmp_path: Path
) -> None:
    root, folder = harmed(data_root, tmp_path / "data"), tmp_path / "run"
    bad = [cut(root / f"scenes/images/train/{number:06d}.png") for number in (3, 20)]
    run = {**SHORT, "max_epoch": 3, "max_iters": None}
    ended = commands("--cfg", recipe(run=run), f"run.data_root={root}", f"run.output_dir={folder}")
    assert ended.code == 0, ended.output
    entries = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["record"] for entry in entries) == ["scenes/40", "scenes/41", "scenes/6", "scenes/7"]
    assert {entry["cause"] for entry in entries} == {"truncated_image"}
    assert all(any(str(path) in entry["detail"] for path in bad) for entry in entries)


def test_an_evaluation_of_what_is_left_of_damaged_data_is_refused(
    commands: Commands, recipe: Recipe, data_root: Path, tmp_path: Path
) -> None:
    root = harmed(data_root, tmp_path / "data")
    for number in range(4):
        cut(root / f"scenes/images/test/{number:06d}.png")
    places = [f"run.data_root={root}", f"run.output_dir={tmp_path / 'run'}", "run.test_splits=[test]"]
    text = paragraph(commands("--cfg", recipe(run=SHORT), *places))
    assert "4 of 16 texts of split test cannot be read (scenes: 4 truncated_image), more than" in text
    assert "the first is scenes/0: truncated_image" in text
    assert not (tmp_path / "run").exists()
    ended = commands("--cfg", recipe(run=SHORT), *places, "run.max_bad_ratio=0.25")
    assert ended.code == 0, ended.output
    assert len(json.loads(next((tmp_path / "run/predictions").iterdir()).read_text())) == 12


def no_tar(path: Path) -> None:
    path.write_bytes(b"not found\n" * 1000)


@pytest.mark.parametrize(
    ("harm", "cause"),
    [(cut, "truncated_shard"), (lambda p: cut(p, 0), "truncated_shard"), (no_tar, "unreadable_shard")],
    ids=["half", "empty", "no tar"],
)
def test_damaged_shards_end_a_run_above_the_ratio_before_it_begins(
    commands: Commands,
    recipe: Recipe,
    data_root: Path,
    tmp_path: Path,
    harm: Callable[[Path], Any],
    cause: str,
) -> None:
    root = harmed(data_root, tmp_path / "data")
    for number in (7, 8):
        harm(root / SHARDS.format(number))
    places = [f"run.data_root={root}", f"run.output_dir={tmp_path / 'run'}"]
    text = paragraph(commands("--cfg", recipe("shards", run=SHORT), *places))
    assert (
        f"2 of 32 shards cannot be read (scenes_shards: 2 {cause}), more than run.max_bad_ratio=0.05" in text
    )
    assert f"the first is train-00007.tar: {cause} ({root}/scenes/shards/train-00007.tar: " in text
    assert not (tmp_path / "run").exists()


def test_one_damaged_shard_of_many_is_left_out_and_listed(
    commands: Commands, recipe: Recipe, data_root: Path, tmp_path: Path
) -> None:
    root, folder = harmed(data_root, tmp_path / "data"), tmp_path / "run"
    cut(root / SHARDS.format(7))
    run = {**SHORT, "max_epoch": 2, "max_iters": None}
    ended = commands("--cfg", recipe("shards", run=run), f"run.data_root={root}", f"run.output_dir={folder}")
    assert ended.code == 0, ended.output
    [entry] = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert (entry["record"], entry["cause"]) == ("train-00007.tar", "truncated_shard")


# `blip data`


@pytest.mark.parametrize(
    ("name", "counted"), [("scenes", "16 truncated_image"), ("scenes_shards", "8 truncated_shard")]
)
def test_checking_damaged_data_ends_with_what_is_wrong(
    commands: Commands, data_root: Path, tmp_path: Path, name: str, counted: str
) -> None:
    root = harmed(data_root, tmp_path / "data")
    for number in range(8):
        cut(root / f"scenes/images/train/{number:06d}.png")  # of two records each
        cut(root / SHARDS.format(number))
    ended = commands("check", "--data-root", root, name, module="blip.data.__main__")
    assert f"  unusable:       {counted}\n" in ended.output
    assert f"error: more than 5.0% of the records are unusable ({name} train: " in ended.output
    assert paragraph(ended).endswith("; the causes are above, and --report FILE lists every record\n")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["check", "scnes"], "scnes: neither a named dataset nor a file or folder"),
        (["check", "scenes", "--data-root", "/dev/null"], "run 'blip data make scenes'"),
        (
            ["prepare", "coco_captoin"],
            "in the catalogue; did you mean 'coco_caption'?",
        ),
        (
            ["prepare", "coco_caption", "--data-root", "/dev/null"],
            "coco_caption: not complete, 2 entries",
        ),
        (["make", "scenes", "--data-root", "/dev/null"], "/dev/null"),
        (["make", "scenes", "--data-root", "/proc/data"], "/proc/data"),
        (["make", "scenes", "--size", "1"], "size"),
    ],
    ids=" ".join,
)
def test_commands_on_data_end_with_what_to_do(commands: Commands, argv: list[str], told: str) -> None:
    assert told in paragraph(commands(*argv, module="blip.data.__main__"))
