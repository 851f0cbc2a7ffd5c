"""Files of safetensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip.errors import CheckpointError, brief

ALIASES = "aliases"
"""Metadata key: JSON of name -> name of the tensor it is another name for."""
MOST_HEADER = 16 << 20
"""Bytes; a hundred thousand tensors have about 10."""


def read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    """The named tensors of a file, mapped into memory.

    Args:
        path: of a regular file.
        size: its bytes.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        _check_header(path, size)
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            aliases = json.loads((file.metadata() or {}).get(ALIASES, "{}"))
            for alias, name in aliases.items():
                tensors.setdefault(alias, tensors[name])
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"'{path}' is damaged or no safetensors file: {brief(error)}; use another"
        ) from error
    return tensors


def _check_header(path: Path, size: int) -> None:
    """Raise ValueError for a header that the file is too short for, or that is none."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
    if length > MOST_HEADER:
        raise ValueError(f"its header is to have {length} bytes, of which {MOST_HEADER} are the most")
    if 8 + length > size:
        raise ValueError(f"its header is to have {length} bytes, but the file has {size}: it is cut off")
