"""Where checkpoints lie, what tells a complete one, and the files in it.

checkpoints/step-00000120/      written under another name, flushed to disk, then renamed
    model.safetensors           the model without its declared frozen parts
    optimizer.pt                states with tensors: optimizer, moving average
    rank-00000.pt ...           per rank: random generators, data position
    state.json                  written last: format, step, plain states, size and checksum of each file
checkpoints/last, best          pointers: links, or small files where links do not work
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip import atomic
from blip.errors import CheckpointError, brief
from blip.weights import CHECKPOINT_FOLDER, pointed

log = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"
TENSORS_FILE = "optimizer.pt"
STATE_KEYS = frozenset({"format", "step", "class", "arch", "model_type"})
STATE_KEYS |= {"world_size", "frozen", "stateful", "files"}

_STEP_NAME = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 22


# Places


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_number(folder: Path) -> int:
    """The step that a checkpoint folder's name tells, -1 for other names."""
    found = _STEP_NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def step_folders(folder: Path) -> list[Path]:
    """All folders that are named as checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((f for f in folder.iterdir() if step_number(f) >= 0 and f.is_dir()), key=step_number)


def rank_file(rank: int) -> str:
    """Name of the file with what a rank has of its own."""
    return f"rank-{rank:05d}.pt"


def partial_folder(place: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `place`."""
    return place.with_name(atomic.PARTIAL + place.name)


def clean_up(folder: Path) -> None:
    """Remove what killed saves have left."""
    for leftover in folder.glob(atomic.PARTIAL + "*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def remove(folder: Path) -> None:
    """Remove a checkpoint; under another name first, so that half of it is never taken for one."""
    aside = folder.with_name(f"{atomic.PARTIAL}old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def point(pointer: Path, folder: Path) -> None:
    """Make `pointer` name the folder beside it, atomically."""
    partial = pointer.with_name(atomic.PARTIAL + pointer.name)
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(folder.name)
        os.replace(partial, pointer)
    except OSError:  # some file systems have no links
        atomic.write_text(pointer, folder.name + "\n")


def pointer_target(pointer: Path) -> Path | None:
    """The checkpoint folder that a pointer names, if it is there."""
    folder = pointer.parent / os.readlink(pointer) if pointer.is_symlink() else pointed(pointer)
    return folder if folder.is_dir() and step_number(folder) >= 0 else None


# Which checkpoint


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder; incomplete ones are passed over with a warning."""
    for folder in reversed(step_folders(Path(run_dir) / CHECKPOINT_FOLDER)):
        try:
            read_state(folder)
        except CheckpointError as error:
            log.warning("%s", error)
        else:
            return folder
    return None


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a user's path means: its folder, a pointer, a run folder.

    Raises:
        CheckpointError: there is none, or it is incomplete.
    """
    folder = pointer_target(path) or path
    if (folder.is_dir() and step_number(folder) >= 0) or (folder / STATE_FILE).is_file():
        read_state(folder)
        return folder
    found = latest(folder.parent if folder.name == CHECKPOINT_FOLDER else folder)
    if found:
        return found
    kind = "holds no complete checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"run.resume: '{path}' {kind}; give a folder like {CHECKPOINT_FOLDER}/step-00000100, a run folder, or"
        " auto (weight files go to model.init_from)"
    )


# Content


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, all of whose files are there in full size.

    Raises:
        CheckpointError: no checkpoint, incomplete, or of an unknown format.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is no complete checkpoint: no {STATE_FILE}; use another one")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = state["format"]
        if version == FORMAT and (lacking := STATE_KEYS - state.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}); use another checkpoint") from error
    if version != FORMAT:
        raise CheckpointError(
            f"'{folder}' has checkpoint format {version}, this version of blip reads {FORMAT}; resume with"
            " the version that wrote it, or start from its weights with model.init_from"
        )
    for name, file in state["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != file["size"]:
            found = "is missing" if size is None else f"has {size} of {file['size']} bytes"
            raise CheckpointError(f"'{folder}' is no complete checkpoint: {name} {found}; use another one")
    return state


def check_content(folder: Path, state: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError unless a file of the checkpoint is what was written, by checksum."""
    if name not in state["files"] or checksum(folder / name) != state["files"][name]["crc32"]:
        raise CheckpointError(
            f"'{folder}' is damaged: {name} is not what was written; use another checkpoint"
        )


def check_names(folder: Path, saved: Collection[str], wanted: Collection[str]) -> None:
    """Raise CheckpointError unless a checkpoint holds exactly the states that a run has."""
    missing, left = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    if missing or left:
        parts = [f"it lacks {', '.join(missing)}"] if missing else []
        parts += [f"it also has {', '.join(left)}"] if left else []
        raise CheckpointError(
            f"'{folder}' holds the state of a run with other options: {' and '.join(parts)}; resume with the"
            " configuration it was saved with (run.ema_decay, for one)"
        )


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def is_plain(value: Any) -> bool:
    """Whether JSON gives `value` back as it was."""
    if isinstance(value, dict):
        return all(type(k) is str and is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def check_storable(value: Any, where: str) -> None:
    """Raise TypeError where `torch.load(weights_only=True)` would refuse to read `value`."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_storable(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_storable(item, f"{where}[{i}]")
    elif value is not None and type(value) not in (bool, int, float, str, bytes, Tensor, nn.Parameter):
        raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def write_tensors(value: dict[str, Any], path: Path) -> None:
    """Write nested containers of tensors and plain values, flushed to disk."""
    torch.save(value, path)
    atomic.sync(path)


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote, on the CPU.

    Raises:
        CheckpointError: it holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign pickle may raise anything
        raise CheckpointError(f"'{path}' cannot be read: {brief(error)}") from error
