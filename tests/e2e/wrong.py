"""What the tests of wrong input share: the paragraph that a command must end with, and ways to do harm."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tests.e2e.runs import Ended

SHORT: dict[str, Any] = {
    "max_iters": 2,
    "warmup_steps": 0,
    "save_freq": None,
    "eval_freq": None,
    "valid_splits": [],
    "test_splits": [],
}


def paragraph(ended: Ended) -> str:
    """The error message, which is the last thing that is printed and is one paragraph."""
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    before, error, text = ended.output.partition("error: ")
    assert error, ended.output
    assert not before or before.endswith("\n")
    first, *others = text.removesuffix("\n").split("\n")
    # Several problems stand one a line below the first, indented.
    assert all(line.startswith("  ") for line in others), text
    assert not others or first.endswith(f"{len(others)} problems:"), text
    return text


def harmed(data_root: Path, place: Path) -> Path:
    """A copy of the data, to do harm to."""
    shutil.copytree(data_root, place)
    return place


def cut(path: Path, share: float = 0.2) -> Path:
    """Let a file lose its end."""
    os.truncate(path, int(path.stat().st_size * share))
    return path


def removed(path: Path) -> Path:
    """Let a file be gone."""
    path.unlink()
    return path
