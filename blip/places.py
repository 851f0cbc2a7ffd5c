"""Where files lie: as given, below the data root, in a folder for weights there."""

from __future__ import annotations

import os
from pathlib import Path

ROOT_VARIABLE = "BLIP_DATA"
WEIGHTS_FOLDER = "weights"
"""Folder below the data root for weights that were downloaded."""


def data_root(configured: str | Path | None = None) -> Path:
    """Where data lies: `run.data_root`, else the environment variable BLIP_DATA, else `data`."""
    return Path(configured or os.environ.get(ROOT_VARIABLE) or "data").expanduser()


def find_file(name: str, root: str | Path | None = None) -> Path | None:
    """A file or folder as given, else below the data root; None where there is none.

    Args:
        name: path; a relative one starts at the working directory, then at the data root, then at the folder
            `weights` there.
        root: None: the environment variable BLIP_DATA, else `data`.
    """
    below = data_root(root)
    places = (Path(name).expanduser(), below / name, below / WEIGHTS_FOLDER / name)
    # Unlike `Path.exists`, it takes names that no file can have.
    return next((place for place in places if os.path.exists(place)), None)
