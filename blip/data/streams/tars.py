"""Plain tar files read in place: which samples a shard holds, and the bytes of their members.

Headers are read in sequence, pictures and texts where a header says they are, when they are needed. Nothing
is extracted, unpickled or executed, and members of unknown kind are ignored.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from blip.data.samples import BadRecord
from blip.data.video import IMAGE_SUFFIXES
from blip.errors import ConfigError, DataError

IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
TEXTS = ("json", "txt")

_MAX_BYTES = 1 << 28
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError)


class Ref(NamedTuple):
    """Where a sample's members are: `files` maps an extension to (offset, bytes) in the shard."""

    shard: int
    key: str
    files: dict[str, tuple[int, int]]


def expand(pattern: str, numbers_only: bool = False) -> list[str]:
    """All names that `{000..012}` and `{a,b}` in `pattern` stand for, in order; several may occur.

    Args:
        pattern: names with braces.
        numbers_only: leave braces alone that hold no span of numbers: in commands they may mean other things.
    """
    found = re.search(r"\{(\d+\.\.\d+)\}" if numbers_only else r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        parts = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        parts = found[1].split(",")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for part in parts for name in expand(head + part + tail, numbers_only)]


def find_shards(pattern: str | Path, root: str | Path | None = None) -> list[Path]:
    """The shard files that `pattern` names: a file, a folder of `.tar` files, `*`, or braces.

    Args:
        pattern: path or pattern, relative to `root`.
        root: folder that relative patterns start from.

    Raises:
        DataError: there is none, or a name that braces stand for is missing.
        ConfigError: a url, command or compressed archive.
    """
    text = str(pattern)
    if re.match(r"(pipe|https?|s3|gs|hdfs|ftp):", text):
        raise ConfigError(
            f"shards {text!r}: not a file; copy the shards to a disk, and give path/{{000..012}}.tar, or read"
            " them as a dataset's path with its key remote: true"
        )
    if text.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ConfigError(
            f"shards {text!r}: compressed archives have no random access; unpack them to plain .tar"
        )
    paths = []
    missing = []
    for name in expand(text):
        path = Path(root or "", name)
        if path.is_dir():
            paths += sorted(path.glob("*.tar"))
        elif path.is_file():
            paths.append(path)
        elif glob.has_magic(name):
            paths += sorted(Path(match) for match in glob.glob(str(path)) if match.endswith(".tar"))
        else:
            missing.append(str(path))
    if missing and not paths:
        raise DataError(
            f"shards {text!r}: none of {len(missing)} files is there, the first would be {missing[0]!r};"
            " correct the path, or put them there"
        )
    if missing:
        raise DataError(
            f"shards {text!r}: {len(missing)} of {len(missing) + len(paths)} files are missing, the first is"
            f" {missing[0]!r}; complete them, or take what is there with a pattern such as '*.tar'"
        )
    if not paths:
        raise DataError(f"shards {text!r}: no .tar file there{f' (below {str(root)!r})' if root else ''}")
    return paths


def scan(path: Path, shard: int, label: str) -> Iterator[Ref | BadRecord]:
    """The samples of a shard in stored order: adjacent members of equal name up to the first dot.

    Where a member comes twice (a key that was given to two samples), the second begins a sample of its own.
    Names with another dot, such as `a.b.jpg`, have no such member: each gives an empty sample of that name.
    A BadRecord stands where the shard cannot be read (any further).

    Args:
        path: the shard.
        shard: its number, for the references.
        label: its name, for the bad records.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        yield BadRecord("unreadable_shard", label, str(error))
        return
    with file:
        yield from scan_file(file, shard, label)


def scan_file(file: IO[bytes], shard: int, label: str) -> Iterator[Ref | BadRecord]:
    """As `scan`, of an opened shard; members may be read from the same file on the way."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _groups(tar, size, shard, label)
    except _TAR_ERRORS as error:
        yield BadRecord("unreadable_shard", label, str(error))


def damage(path: Path, label: str) -> BadRecord | None:
    """What a look at the two ends of a shard tells: that it is no tar, or that its end is missing.

    Args:
        path: the shard.
        label: its name, for the bad record.
    """
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - tarfile.BLOCKSIZE))
            tail = file.read()
    except OSError as error:
        return BadRecord("unreadable_shard", label, f"{path}: {error}")
    if problem := bad_header(head):
        return BadRecord("unreadable_shard", label, f"{path}: {problem}")
    if tail != bytes(tarfile.BLOCKSIZE):
        return BadRecord("truncated_shard", label, f"{path}: it ends after {size} bytes, within a record")
    return None


def bad_header(head: bytes) -> str | None:
    """Why the first block of a file is not that of a tar; None where it may be."""
    try:
        if any(head):
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except _TAR_ERRORS as error:
        return str(error)
    return None


def _groups(tar: tarfile.TarFile, size: int, shard: int, label: str) -> Iterator[Ref | BadRecord]:
    ref = Ref(shard, "", {})
    others: dict[str, None] = {}
    for key, extension, place in _members(tar, size):
        if place is None:
            # What stands before the break may be half a sample; the rest of it is lost then.
            if _complete(ref):
                yield ref
            yield BadRecord("truncated_shard", label)
            return
        # A member that the sample has already begins another one: nothing with a key of its own is lost.
        if key != ref.key or extension in ref.files:
            yield from _group(ref, others)
            ref, others = Ref(shard, key, {}), {}
        if "." in extension:
            others[f"{key}.{extension.rpartition('.')[0]}"] = None
        else:
            ref.files[extension] = place
    yield from _group(ref, others)


def _group(ref: Ref, others: Iterable[str]) -> Iterator[Ref]:
    """A sample; or, of names with another dot only, an empty one for each, to be counted."""
    if ref.files:
        yield ref
    else:
        yield from (Ref(ref.shard, key, {}) for key in others)


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """(key, extension, (offset, bytes)) of the known members; None for the place where the tar breaks off."""
    last = -1
    while True:
        try:
            info = tar.next()
        except _TAR_ERRORS:
            break
        if info is None:
            # tarfile takes a broken header for the end; the true end is a block of zeros.
            tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
            if tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):  # type: ignore[union-attr]
                return
            break
        tar.members.clear()  # type: ignore[attr-defined]
        if info.size < 0 or info.offset_data <= last or info.offset_data + info.size > size:
            break
        last = info.offset_data
        folder, _, base = info.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        known = extension.rpartition(".")[2] in IMAGES + TEXTS
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and stem and known:
            yield (f"{folder}/{stem}" if folder else stem), extension, (info.offset_data, info.size)
    yield "", "", None


def other_members(file: IO[bytes], refs: Sequence[Ref]) -> list[dict[str, tuple[int, int]]]:
    """Of each sample of an opened shard the members of unknown kind, as in `Ref.files`.

    Args:
        file: the shard.
        refs: its samples.
    """
    found: list[dict[str, tuple[int, int]]] = [{} for _ in refs]
    owners = {place: number for number, ref in enumerate(refs) for place in ref.files.values()}
    latest: dict[str, int] = {}
    early: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    file.seek(0)
    with suppress(*_TAR_ERRORS), tarfile.open(fileobj=file, mode="r:") as tar:  # to where it breaks off
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            folder, _, base = info.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key, place = (f"{folder}/{stem}" if folder else stem), (info.offset_data, info.size)
            if place in owners:
                latest[key] = owners[place]
                for name, one in early.pop(key, ()):
                    found[owners[place]].setdefault(name, one)
            elif info.isreg() and stem and extension:
                own = found[latest[key]] if key in latest else None
                if own is None or extension in own:  # it stands before its sample
                    early.setdefault(key, []).append((extension, place))
                else:
                    own[extension] = place
    return found


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Append a sample; headers hold no time and no owner, so equal content is equal bytes.

    Args:
        tar: open for writing.
        key: of the sample, without a dot in its last part.
        members: ending -> content, in their order.
    """
    for ending, content in members.items():
        info = tarfile.TarInfo(f"{key}.{ending}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _complete(ref: Ref) -> bool:
    return any(e in ref.files for e in IMAGES) and any(e in ref.files for e in TEXTS)


def payload(file: IO[bytes], place: tuple[int, int], name: str) -> bytes:
    """A member's bytes from its opened shard.

    Raises:
        BadRecord: it is not there, or larger than 256 MiB.
    """
    offset, size = place
    if size > _MAX_BYTES:
        raise BadRecord("too_large", name)
    try:
        file.seek(offset)
        data = file.read(size)
    except OSError as error:
        raise BadRecord("unreadable_shard", name) from error
    if len(data) < size:
        raise BadRecord("truncated_shard", name)
    return data
