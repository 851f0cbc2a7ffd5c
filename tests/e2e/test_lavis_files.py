"""LAVIS's own recipes of BLIP and BLIP-2 as files (fixtures): no key is lost, and the commands take them.

What their values mean here stands in `test_lavis_recipes` and `test_lavis_blip2_recipes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blip.config.files import plain, read_yaml
from blip.config.load import load_config
from blip.data.catalog.table import names
from blip.evaluate import main as evaluate
from blip.train import main as train
from tests.e2e.runs import ROOT

FOLDER = ROOT / "tests" / "unit" / "config" / "fixtures" / "lavis"
FILES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
RENAMED = ("run.amp", "run.resume_ckpt_path")
"""Keys that act here by another name; the first is also reported where it changes nothing."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_there_are_files() -> None:
    assert {name.rpartition("/")[0] for name in FILES} == {
        *("", "blip/train", "blip/eval", "blip2/train", "blip2/eval")
    }


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_a_file_acts_here_or_is_reported(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    config = load_config(str(path), known_datasets=names())
    noted = {note.split(": ")[1] for note in config.notes}
    tree, given = plain(config), dict(_leaves(read_yaml(path, path.name)))
    lost = {
        key: value
        for key, value in given.items()
        if key not in noted and key not in RENAMED and _at(tree, key) != value
    }
    assert lost == {}
    written = [f"{key}." for key in (*given, "run.amp")]
    assert [note for note in noted if not any(key.startswith(f"{note}.") for key in written)] == []


@pytest.mark.parametrize("name", FILES)
def test_commands_print_a_file_and_say_what_is_missing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = evaluate if "/eval/" in name else train
    path = str(FOLDER / f"{name}.yaml")
    assert command(["--cfg-path", path, "--print-config"]) == 0
    assert "datasets:" in capsys.readouterr().out
    assert command(["--cfg-path", path, "--options", "run.data_root=empty"]) == 2
    message = capsys.readouterr().err
    assert "no file" in message
    if "gqa" in name:  # its variant has files of its own, and its val is testdev
        assert "no file 'gqa/annotations/testdev_balanced_questions.json'" in message
    else:
        data = load_config(path, known_datasets=names()).datasets
        assert f"blip data prepare {' '.join(data)}" in message


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _at(tree: dict[str, Any], key: str) -> Any:
    found: Any = tree
    for part in key.split("."):
        found = found[part]
    return found
