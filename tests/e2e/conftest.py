"""What the end-to-end tests share: a little data, and a process that starts commands quickly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blip.data.scenes.make import make_scenes
from tests.e2e.runs import Commands, write_recipe

Recipe = Callable[..., Path]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training pictures with two captions each, in files and in 32 shards; 16 for each of val and test."""
    root = tmp_path_factory.mktemp("data")
    make_scenes(root, size=32, train=64, val=16, test=16, web=0, workers=0)
    return root


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("output"))
    yield started
    started.close()


@pytest.fixture
def recipe(tmp_path: Path, data_root: Path) -> Recipe:
    """Writes the tiny recipe: `recipe("json", run={...}, model={...})`."""

    def write(data: str = "json", **sections: dict[str, Any]) -> Path:
        return write_recipe(tmp_path / f"{data}.yaml", data_root, data, **sections)

    return write
