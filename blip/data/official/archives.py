"""Zip and tar files of pictures and annotations, unpacked inside one folder and nowhere else.

Only plain files are written, of kinds that datasets consist of; what a member's name or type would do
otherwise is counted, not done. A file that is there with its whole size is not written again, so an
interrupted unpacking goes on where it was.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from blip.atomic import PARTIAL
from blip.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from blip.errors import DataError, brief

_NOTES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
KINDS = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *_NOTES)
"""Endings of the members that are written."""
ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
MOST_BYTES = 1 << 34
"""A member that claims to be larger is refused: 16 GiB."""
MOST_RATIO = 500
"""A member of a zip file that would grow more than this is refused, where it is larger than 1 MiB."""

_CHUNK = 1 << 20
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, OSError, EOFError, ValueError, RuntimeError)


@dataclass
class Unpacked:
    """What was done with the members of an archive."""

    written: int = 0
    there: int = 0
    """Were written before."""
    refused: Counter[str] = field(default_factory=Counter)
    """By cause: outside, link, device, too_large, bomb, encrypted, in_the_way."""
    ignored: int = 0
    """Files of other kinds."""
    first: str = ""
    """The first refused member."""
    notes: list[Path] = field(default_factory=list)
    """The files that are no pictures or videos."""

    def line(self) -> str:
        """For people."""
        causes = ", ".join(f"{count} {cause}" for cause, count in self.refused.most_common())
        return (
            f"{self.written} files unpacked, {self.there} were there, {self.ignored} of other kinds left out"
            + (f"; refused: {causes}, the first is {self.first!r}" if causes else "")
        )


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    packed: int
    """Bytes in the archive; 0 where they cannot be told."""
    trouble: str
    """Why it is refused whatever its name; empty: a plain file."""
    handle: Any


def holds(path: Path, start: str) -> bool:
    """Whether an archive is that of the set that it is taken for: some member starts with a pattern.

    Raises:
        DataError: it is no archive that can be read.
    """
    if not start:
        return True
    with _opened(path) as archive:
        for number, member in enumerate(_members(archive)):
            if re.match(start, member.name.removeprefix("./")):
                return True
            if number > 50:  # archives of pictures do not hide them behind other files
                return False
    return False


def unpack(path: Path, folder: Path, most_bytes: int = MOST_BYTES, most_ratio: int = MOST_RATIO) -> Unpacked:
    """Write the plain files of an archive below `folder`.

    Args:
        path: zip or tar file.
        folder: made where it is missing.
        most_bytes: a larger member is refused.
        most_ratio: a member of a zip file that would grow more than this is refused.

    Raises:
        DataError: the archive is damaged, or the disk cannot hold what it says it has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = Unpacked()
    inside: set[Path] = set()
    with _opened(path) as archive:
        room = shutil.disk_usage(folder).free
        for member in _members(archive):
            target = _target(folder, member, most_bytes, most_ratio, done, inside)
            if target is None:
                continue
            if target.name.lower().endswith(_NOTES):
                done.notes.append(target)
            if target.is_file() and target.stat().st_size == member.size:
                done.there += 1
                continue
            room -= member.size
            if room < 0:
                raise DataError(
                    f"{path}: the disk of {folder} is too small for what it holds; make room, or set"
                    " run.data_root (or BLIP_DATA) to a larger one, and run this again"
                )
            _write(archive, member, target, path)
            done.written += 1
    return done


def _target(
    folder: Path, member: _Member, most_bytes: int, most_ratio: int, done: Unpacked, inside: set[Path]
) -> Path | None:
    """Where a member goes; None where it goes nowhere, which is counted."""
    cause = member.trouble
    parts = [part for part in member.name.replace("\\", "/").split("/") if part not in ("", ".")]
    outside = member.name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", member.name)
    if not cause and (outside or not parts or "\0" in member.name):
        cause = "outside"
    elif not cause and (member.size > most_bytes or member.size < 0):
        cause = "too_large"
    elif not cause and member.size > max(_CHUNK, member.packed * most_ratio) and member.packed:
        cause = "bomb"
    if cause == "folder":
        return None
    if not cause:
        ending = parts[-1].lower()
        if not ending.endswith(KINDS) or parts[-1].startswith(("._", PARTIAL)):
            done.ignored += 1
            return None
        target = folder.joinpath(*parts)
        # A link that stands in the folder already could lead out of it.
        if target.parent not in inside and target.parent.resolve().is_relative_to(folder.resolve()):
            inside.add(target.parent)
        if target.parent in inside and not target.is_symlink():
            return target
        cause = "in_the_way"
    done.refused[cause] += 1
    done.first = done.first or member.name
    return None


def _write(archive: Any, member: _Member, target: Path, path: Path) -> None:
    partial = target.with_name(f"{PARTIAL}{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _content(archive, member) as source, partial.open("wb") as file:
            left = member.size
            while chunk := source.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise ValueError(f"more than the {member.size} bytes that it should have")
                file.write(chunk)
            if left:
                raise EOFError(f"{left} of {member.size} bytes are missing")
        os.replace(partial, target)
    except _BROKEN as error:
        raise DataError(
            f"{path}: member {member.name!r} cannot be unpacked to {target} ({brief(error)}); where the"
            " archive is damaged, fetch it again; what is unpacked stays"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    with ExitStack() as stack:
        try:
            if path.name.lower().endswith(".zip"):
                archive: zipfile.ZipFile | tarfile.TarFile = zipfile.ZipFile(path)
            else:
                # Python's own gzip checks what it reads, tarfile's does not. And as a stream, since an index
                # of millions of members would fill the memory.
                packed = path.name.lower().endswith("gz")
                file: Any = gzip.open(path) if packed else path.open("rb")  # noqa: SIM115
                archive = tarfile.open(path, "r|", fileobj=stack.enter_context(file))  # noqa: SIM115
        except _BROKEN as error:
            problem = f"{path}: cannot be read as an archive ({brief(error)}); is it complete?"
            raise DataError(problem) from error
        stack.enter_context(archive)  # type: ignore[arg-type]
        yield archive


def _members(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    if isinstance(archive, zipfile.ZipFile):
        for entry in archive.infolist():
            mode = entry.external_attr >> 16
            kind = stat.S_IFMT(mode)
            trouble = "folder" if entry.is_dir() else "link" if kind == stat.S_IFLNK else ""
            trouble = trouble or ("device" if kind not in (0, stat.S_IFREG) else "")
            trouble = trouble or ("encrypted" if entry.flag_bits & 1 else "")
            yield _Member(entry.filename, entry.file_size, max(1, entry.compress_size), trouble, entry)
        return
    while True:
        try:
            info = archive.next()
        except _BROKEN as error:
            raise DataError(f"{archive.name!s}: breaks off ({brief(error)}); fetch it again") from error
        if info is None:
            _check_end(archive)
            return
        archive.members.clear()  # type: ignore[attr-defined]
        trouble = "folder" if info.isdir() else "link" if info.issym() or info.islnk() else ""
        trouble = trouble or ("" if info.isreg() else "device")
        yield _Member(info.name, info.size, 0, trouble, info)


def _check_end(archive: Any) -> None:
    """Raise where it was no end: tarfile takes a broken header for one, but zeros follow the true one."""
    try:
        whole = archive.fileobj.tell() >= archive.offset + tarfile.BLOCKSIZE
        while whole and (rest := archive.fileobj.read(_CHUNK)):
            whole = not rest.strip(b"\0")
    except _BROKEN:
        whole = False
    if not whole:
        raise DataError(f"{archive.name!s}: breaks off before its end; fetch it again")


def _content(archive: Any, member: _Member) -> IO[bytes]:
    if isinstance(archive, zipfile.ZipFile):
        return archive.open(member.handle)
    content = archive.extractfile(member.handle)
    assert content is not None, "a plain file has content"
    return content
