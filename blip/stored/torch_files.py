"""Files of `torch.save`: looked at first, then read with `torch.load(weights_only=True)`."""

from __future__ import annotations

import re
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.errors import CheckpointError, brief
from blip.stored.files import shown, some
from blip.stored.pickles import MAGIC, MOST_BYTES, Foreign, Refused, follow

_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_LEGACY = b"\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."
"""Behind two bytes for the protocol, what files begin with that torch wrote before 1.6."""
_LEGACY_PICKLES = 5
_HEADER, _END, _LOCATOR, _END64 = 30, 22, 20, 56
"""Sizes of what stands before a member, and of what closes an archive."""


def read_torch(path: Path, size: int, archive: bool) -> dict[str, Tensor]:
    """The named tensors of a file, mapped into memory if it is an archive.

    Args:
        path: of a regular file.
        size: its bytes.
        archive: whether it begins as one.

    Raises:
        CheckpointError: it is damaged, holds Python objects or no named tensors, or would take more memory
            than it has bytes.
    """
    try:
        _check_archive(path, size) if archive else _check_legacy(path, size)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        tensors = _named_tensors(content)
    except Foreign as error:
        raise CheckpointError(_foreign(path, str(error))) from error
    except Refused as error:
        raise CheckpointError(f"'{path}' is damaged or no weight file: {error}; use another") from error
    except Exception as error:  # torch raises anything at what is damaged
        text = str(error)
        if found := re.search(r"GLOBAL (\S+)", text):
            raise CheckpointError(_foreign(path, shown(found[1]))) from error
        # What torch says of `weights_only` advises what is never done here.
        reason = "" if "weights_only" in text else f": {brief(error)}"
        raise CheckpointError(f"'{path}' is damaged or no weight file{reason}; use another") from error
    for name, tensor in tensors.items():
        _check_stored(path, name, tensor)
    if not tensors:
        kind = type(content).__name__
        raise CheckpointError(
            f"'{path}' holds no named tensors but a {kind}; a state dict or {{'model': ...}} is needed"
        )
    return tensors


def _foreign(path: Path, name: str) -> str:
    return (
        f"'{path}' holds Python objects ({name}) beside tensors, which could run code when read; where you"
        " trust the file, save its state dict alone"
    )


def _check_archive(path: Path, size: int) -> None:
    """Raise Refused for an archive that torch has not written, or whose pickle does more than tensors need.

    A few packed bytes could become more than the memory holds, and what two readers of archives understand
    differently, nobody has looked at.
    """
    with path.open("rb") as file:
        _check_end(file, size)
        with zipfile.ZipFile(file) as archive:
            items = archive.infolist()
        names = [item.filename for item in items]
        if packed := [item.filename for item in items if item.compress_type != zipfile.ZIP_STORED]:
            raise Refused(f"it has packed members ({some(packed)}), which torch does not write")
        if any(item.compress_size != item.file_size or item.flag_bits & 1 for item in items):
            raise Refused("it has members of another size than they say")
        if len({name.casefold() for name in names}) < len(names):
            raise Refused("it has two members of the same name")
        top = names[0].split("/")[0] if names else ""
        if odd := [name for name in names if not name.startswith(f"{top}/") or ".." in name.split("/")]:
            raise Refused(f"it has members outside of the folder {shown(top)!r} ({some(odd)})")
        _check_places(items, size)
        members = {item.filename.removeprefix(f"{top}/"): item for item in items}
        if "constants.pkl" in members:
            raise Refused("it is a TorchScript program, which holds code; save its state dict")
        if "data.pkl" not in members:
            raise Refused("it is an archive, but not of torch: it has no data.pkl")
        pickle = members["data.pkl"]
        if pickle.file_size > MOST_BYTES:
            raise Refused(f"its pickle has {pickle.file_size} bytes, more than {MOST_BYTES}")
        file.seek(pickle.header_offset + 26)
        named, extra = struct.unpack("<HH", file.read(4))
        file.seek(named + extra, 1)
        asked = follow(file.read(pickle.file_size)).storages
    for key, wanted in asked.items():
        member = members.get(f"data/{key}")
        if member is None or member.file_size < wanted:
            there = "are missing" if member is None else f"are only {member.file_size}"
            raise Refused(f"its storage {shown(key)!r} is to have {wanted} bytes, which {there}")


def _check_end(file: Any, size: int) -> None:
    """The list of members ends where its end begins, so that there is one list, whoever looks for it."""
    last = min(size, _END + _LOCATOR)
    file.seek(size - last)
    tail = file.read(last)
    end, locator = tail[-_END:], tail[: -_END or None]
    if len(tail) < _END or not end.startswith(b"PK\x05\x06") or end[-2:] != b"\0\0":
        raise Refused("it is cut off, or something stands behind its end")
    length, start, stop = (*struct.unpack("<II", end[12:20]), size - _END)
    if locator.startswith(b"PK\x06\x07"):
        stop = struct.unpack("<Q", locator[8:16])[0]
        if stop + _END64 + _LOCATOR + _END != size:
            raise Refused("it has two ends")
        file.seek(stop)
        length, start = struct.unpack("<QQ", file.read(_END64)[40:])
    if start + length != stop:
        raise Refused("its list of members is not where it is said to be")


def _check_places(items: list[zipfile.ZipInfo], size: int) -> None:
    """No two members share bytes, and all lie in the file."""
    stop = 0
    for item in sorted(items, key=lambda item: item.header_offset):
        if item.header_offset < stop:
            raise Refused(f"its member {shown(item.filename)!r} lies over another one")
        stop = item.header_offset + _HEADER + len(item.orig_filename) + item.file_size
    if stop > size:
        raise Refused("its members are larger than it is")


def _check_legacy(path: Path, size: int) -> None:
    """Raise Refused for a file that torch did not write before 1.6, or whose pickles do more than needed."""
    with path.open("rb") as file:
        data = file.read(min(size, MOST_BYTES))
    if data[:1] != b"\x80" or not data[2:].startswith(_LEGACY):
        raise Refused("it does not begin as files of torch.save do")
    try:
        tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        pass
    else:
        raise Refused("it is a tar archive")
    end = 0
    storages: dict[str, int] = {}
    for _ in range(_LEGACY_PICKLES):
        followed = follow(data, end)
        end, storages = followed.end, {**storages, **followed.storages}
    if (wanted := sum(storages.values())) > size - end:
        raise Refused(f"its tensors need {wanted} bytes, but only {size - end} are there")


def _check_stored(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a tensor of no plain numbers, or larger than what is stored of it."""
    if tensor.is_sparse or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(f"'{path}': {shown(name)} is no plain tensor ({tensor.layout}); save it as one")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        stored = tensor.untyped_storage().nbytes()
        raise CheckpointError(
            f"'{path}': {shown(name)} is {tuple(tensor.shape)}, but only {stored} bytes of it are there"
        )


def _named_tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    # A pickle may have given the dictionary attributes, which could stand before its methods.
    content = dict(content)
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        inner = dict(inner) if isinstance(inner, Mapping) else {}
        if any(isinstance(value, Tensor) for value in inner.values()):
            content = inner
            break
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
