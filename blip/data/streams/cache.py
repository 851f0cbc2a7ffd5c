"""A bounded folder of fetched files that threads, workers, ranks and runs of one machine share.

A file is there whole or not at all. Whoever has it open holds a shared lock on it, and only what nobody holds
is removed, longest unused first. Locks belong to open files, so none outlives its process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from blip import atomic
from blip.errors import ConfigError, DataError

_LOCK = ".lock-"
"""Start of the names of empty files: who has locked one fetches the file of that name."""


class ShardCache:
    """Files by name.

    Args:
        folder: made when the first file comes.
        limit: bytes of all files. It is exceeded only while all of them are open.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, name: str, fetch: Callable[[IO[bytes]], None]) -> IO[bytes]:
        """The file, opened for reading, as `fetch` has written it now or before.

        Where several ask for the same one, one fetches and the others wait.

        Raises:
            OSError: what `fetch` raised; the file is not there then.
            DataError: the folder cannot be written to.
        """
        place = self.folder / name
        while (file := _held(place)) is None:
            with self._create(self.folder / f"{_LOCK}{name}") as turn:
                _lock(turn, self.folder)
                lock = Path(turn.name)
                if not place.exists() and _same(lock, turn):  # otherwise another one was quicker
                    try:
                        file = self._fetched(place, fetch)
                        break
                    finally:
                        lock.unlink()
        os.utime(place)
        self.make_room(0)
        return file

    def _fetched(self, place: Path, fetch: Callable[[IO[bytes]], None]) -> IO[bytes]:
        """The file, opened; this process is the only one that fetches it."""
        partial = place.with_name(f"{atomic.PARTIAL}{place.name}")
        while True:
            with self._create(partial) as out:
                _lock(out, self.folder, shared=True)
                if not _same(partial, out):  # it was removed as a leftover
                    continue
                try:
                    out.truncate(0)
                    fetch(out)
                    out.flush()
                    os.replace(partial, place)
                except BaseException:
                    partial.unlink(missing_ok=True)
                    raise
                if (file := _held(place)) is not None:
                    return file

    def make_room(self, size: int) -> bool:
        """Remove files that nobody has open until `size` bytes fit in; whether they do."""
        files = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.startswith(_LOCK):
                files.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, held, path in sorted(files):
            if total + size <= self.limit:
                break
            if _remove(path):
                total -= held
        return total + size <= self.limit

    def _create(self, path: Path) -> IO[bytes]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(path, "r+b", opener=lambda path, _: os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        except OSError as error:
            raise _unusable(self.folder, error) from error


def _held(path: Path) -> IO[bytes] | None:
    """The file, opened and locked against removal; None where it is not, or no longer, there."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unusable(path.parent, error) from error
    _lock(file, path.parent, shared=True)
    if _same(path, file):
        return file
    file.close()
    return None


def _unusable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"'{folder}': fetched shards cannot be kept there ({error.strerror}); set the dataset's cache_dir"
        " to a folder on a local disk"
    )


def _remove(path: Path) -> bool:
    """Remove a file that nobody has open; whether that was so."""
    try:
        with path.open("rb") as file:
            if not _lock(file, path.parent, wait=False):
                return False
            path.unlink()
    except FileNotFoundError:
        return False
    return True


def _same(path: Path, file: IO[bytes]) -> bool:
    """Whether an opened file is still what lies there."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], folder: Path, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, or change the kind of its lock; without `wait`, whether that was possible.

    Raises:
        ConfigError: there are no locks here.
    """
    try:
        import fcntl  # not on every system

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"'{folder}': files cannot be locked there ({error}), which remote shards need; set the dataset's"
            " cache_dir to a folder on a local disk"
        ) from error
    return True
