"""Files that came from elsewhere: what is looked at before anything reads them."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip.errors import CheckpointError, brief

MOST_JSON = 32 << 20
"""Bytes of an index or a configuration; that of a language model with a hundred thousand tensors has 10."""
MOST_NAME = 500
"""Letters of a tensor's name."""
MOST_AXES = 64
"""Dimensions of a tensor; torch computes with no more."""


def shown(name: str, most: int = 200) -> str:
    """A name out of a file as a message can hold it: neither long nor with control characters."""
    text = name if len(name) <= most else f"{name[:most]}... ({len(name)} letters)"
    return text if text.isprintable() else ascii(text)[1:-1]


def some(names: Sequence[str], count: int = 4) -> str:
    """The first names, and how many there are beyond them."""
    rest = f", ... and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(shown, names[:count])) + rest


def size_of(path: Path) -> int:
    """Bytes of a regular file; opening a pipe would wait, and reading a device never end.

    Raises:
        CheckpointError: it is none, or cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"'{path}' is no regular file; give a weight file")
    return status.st_size


def inside(file: Path, folder: Path | None = None) -> Path:
    """The file or folder, if no link leads out of the folder it lies in; the hub's cache links to `blobs`.

    Args:
        file: what is to be read.
        folder: where it must be; None: the folder that it is named in.

    Raises:
        CheckpointError: a link leads out. Others' folders must not bring files to light that are not theirs.
    """
    try:
        real, within = file.resolve(), (folder or file.parent).resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise CheckpointError(f"'{file}' is a link that leads nowhere ({brief(error)})") from error
    places = [within]
    if within.parent.name == "snapshots":
        places.append(within.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in places):
        raise CheckpointError(
            f"'{file}' is a link that leads out of its folder, to '{real}'; give that path, if it is meant"
        )
    return file


def read_json(path: Path, what: str) -> dict[str, Any]:
    """What a JSON file of others says.

    Args:
        path: of the file.
        what: it is to be, as messages call it.

    Raises:
        CheckpointError: no regular file, too large, no JSON, or no object.
    """
    size = size_of(path)
    if size > MOST_JSON:
        raise CheckpointError(
            f"'{path}' is no {what}: it has {size} bytes, of which {MOST_JSON} are the most"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is no {what} ({brief(error)}); fetch or write it again") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"'{path}' is no {what}: it holds a {kind}; fetch or write it again")
    return content
