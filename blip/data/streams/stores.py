"""Where shards lie: files on disk, or urls that are fetched into a bounded folder while they are read.

Both are opened by number and named alike, so order, position, skipping and counting know no difference: the
samples of fetched shards are those of the same files on disk, bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from blip import keyed
from blip.data.samples import BadRecord
from blip.data.streams import fetch
from blip.data.streams.cache import ShardCache
from blip.data.streams.tars import bad_header, damage, expand
from blip.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SIZES_FILE = "sizes.json"
"""Beside the shards: file name -> number of samples, as open_clip reads it."""
_MOST_PROBED = 128
"""Remote shards that are looked at before a run begins."""


class Store(Protocol):
    """Shards by number."""

    labels: list[str]
    """Their names, which do not depend on where the data lies, but tell equal file names apart."""
    num_samples: int | None
    """Of all together, where the configuration tells."""
    remote: bool
    most_counted: int
    """Samples to count where nothing tells their number, before the rest is estimated."""

    def open(self, shard: int) -> IO[bytes]:
        """The shard; raises OSError where it cannot be had."""
        ...

    def prefetch(self, shard: int) -> None:
        """Told which one is wanted soon."""
        ...

    def where(self, shard: int) -> str:
        """Its place, for messages."""
        ...

    def weight(self, shard: int) -> float:
        """What estimates of its number of samples are in proportion to."""
        ...

    def probed(self) -> list[int]:
        """The shards that are looked at before a run."""
        ...

    def probe(self, shard: int) -> BadRecord | None:
        """What a quick look at it tells."""
        ...

    def known_sizes(self) -> list[int | None]:
        """The number of samples of each, where something tells it."""
        ...

    def take_fetched(self) -> tuple[int, float]:
        """Bytes fetched and seconds waited for them since this was asked before."""
        ...


class LocalShards:
    """Shards on disk.

    Args:
        paths: in a fixed order.
        num_samples: of all shards together, where it is known.
    """

    remote = False
    most_counted = 50_000

    def __init__(self, paths: Sequence[Path], num_samples: int | None = None) -> None:
        self.num_samples = num_samples
        self.paths = [Path(path) for path in paths]
        top = os.path.commonpath([path.absolute().parent for path in self.paths]) if paths else ""
        self.labels = [path.absolute().relative_to(top).as_posix() for path in self.paths]

    def open(self, shard: int) -> IO[bytes]:
        """The file."""
        return self.paths[shard].open("rb")

    def prefetch(self, shard: int) -> None:
        """Nothing: files are read where they lie."""

    def where(self, shard: int) -> str:
        """Its path."""
        return str(self.paths[shard])

    def weight(self, shard: int) -> float:
        """Bytes."""
        return self.paths[shard].stat().st_size

    def probed(self) -> list[int]:
        """All."""
        return list(range(len(self.paths)))

    def probe(self, shard: int) -> BadRecord | None:
        """What its two ends tell."""
        return damage(self.paths[shard], self.labels[shard])

    def known_sizes(self) -> list[int | None]:
        """What `sizes.json` beside them says."""
        tables = {}
        for folder in {path.parent for path in self.paths}:
            file = folder / SIZES_FILE
            if file.is_file():
                tables[folder] = _sizes(file.read_bytes(), str(file))
        return [tables.get(path.parent, {}).get(path.name) for path in self.paths]

    def take_fetched(self) -> tuple[int, float]:
        """Nothing is fetched."""
        return 0, 0.0


class RemoteShards:
    """Shards behind urls or commands, each fetched whole into a bounded folder when it is read.

    `prefetch` fetches in the background, where the folder has room for it. Failures are tried again; what
    cannot be had then is an OSError, which readers count as `unreadable_shard`.

    Args:
        name: of the dataset, for messages.
        urls: in a fixed order; see `find_urls`.
        folder: for what is fetched; each dataset has one of its own in it.
        limit: its bytes.
        num_samples: of all shards together, where it is known.
    """

    remote = True
    most_counted = 1

    def __init__(
        self, name: str, urls: Sequence[str], folder: Path, limit: int, num_samples: int | None = None
    ) -> None:
        self.name = name
        self.urls = list(urls)
        self.num_samples = num_samples
        self.cache = ShardCache(folder / f"{_safe(name)}-{keyed.key(name) % 10**6:06d}", limit)
        self.labels = _labels(self.urls)
        plain = [fetch.shown(url) for url in self.urls]
        # What stands behind `?` may be a signature that is another one each day, or all that tells two apart.
        self._keys = plain if len(set(plain)) == len(plain) else self.urls
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._ahead: dict[int, _Ahead] = {}
        self._lock = threading.Lock()
        self._fetched, self._waited, self._largest = 0, 0.0, 0

    def __getstate__(self) -> dict[str, Any]:
        own = ("_pid", "_ahead", "_lock", "_fetched", "_waited", "_largest")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def open(self, shard: int) -> IO[bytes]:
        """The shard, fetched now or before."""
        self._own()
        began = time.perf_counter()
        try:
            ahead = self._ahead.pop(shard, None)
            return self._open(shard) if ahead is None else ahead.result()
        finally:
            self._waited += time.perf_counter() - began

    def prefetch(self, shard: int) -> None:
        """Fetch it in the background, unless that would drive out what is being read."""
        self._own()
        if shard not in self._ahead and self.cache.make_room(self._largest):
            self._ahead[shard] = _Ahead(partial(self._open, shard))

    def where(self, shard: int) -> str:
        """Its url."""
        return fetch.shown(self.urls[shard])

    def weight(self, shard: int) -> float:
        """All alike: asking thousands for their size takes too long."""
        return 1.0

    def probed(self) -> list[int]:
        """Up to 128, spread over all; no command, for it would have to run to its end."""
        urls = [i for i, url in enumerate(self.urls) if fetch.scheme_of(url) != "pipe"]
        places = np.linspace(0, len(urls) - 1, min(len(urls), _MOST_PROBED)).round().astype(int)
        return [urls[place] for place in places.tolist()]

    def probe(self, shard: int) -> BadRecord | None:
        """What its first block tells."""
        try:
            head = fetch.tried(partial(self._head, shard))
        except OSError as error:
            return BadRecord("unreadable_shard", self.labels[shard], str(error))
        problem = bad_header(head)
        if problem is None:
            return None
        return BadRecord("unreadable_shard", self.labels[shard], f"{self.where(shard)}: {problem}")

    def _head(self, shard: int) -> bytes:
        with fetch.opened(self.urls[shard], start=512) as (stream, _):
            return stream.read(512)

    def known_sizes(self) -> list[int | None]:
        """What `sizes.json` beside them says.

        Raises:
            DataError: it cannot be fetched, though it may be there.
        """
        tables: dict[str, dict[str, int]] = {}
        places = [_parted(url) for url in self.urls]
        for folder in dict.fromkeys(folder for folder, _ in places if folder):
            place = f"{folder}/{SIZES_FILE}"
            try:
                found = fetch.content(place)
            except OSError as error:
                raise DataError(f"datasets.{self.name}: {error}") from error
            if found is not None:
                tables[folder] = _sizes(found, place)
        return [tables.get(folder, {}).get(file) for folder, file in places]

    def take_fetched(self) -> tuple[int, float]:
        """Bytes fetched and seconds waited for them since this was asked before."""
        with self._lock:
            taken = self._fetched, self._waited
            self._fetched, self._waited = 0, 0.0
        return taken

    def _open(self, shard: int) -> IO[bytes]:
        key = self._keys[shard]
        base = _safe(self.labels[shard].rpartition("/")[2])
        return self.cache.open(f"{keyed.key(key):016x}-{base}", partial(self._fetch, shard))

    def _fetch(self, shard: int, out: IO[bytes]) -> None:
        """Write a whole shard; one that ends early although it has all its bytes is damaged at its source."""
        url = self.urls[shard]

        def attempt() -> None:
            out.seek(0)
            out.truncate(0)
            size = fetch.copy(url, out, partial(self._expect, out), self._count)
            out.truncate()
            ended = damage(Path(out.name), self.labels[shard])
            if ended is not None and ended.cause == "unreadable_shard":
                raise fetch.FetchError(f"{self.where(shard)}: it is no tar", final=size is not None)
            if ended is not None and size is None:
                raise _NoEnd(f"{self.where(shard)}: its end is missing")

        try:
            fetch.tried(attempt)
        except _NoEnd as error:
            log.warning("datasets.%s: %s, each time; what is there is read", self.name, error)
        self._largest = max(self._largest, out.tell())

    def _expect(self, out: IO[bytes], size: int) -> None:
        self.cache.make_room(size)
        out.truncate(size)  # the folder's other users see what it will take

    def _count(self, size: int) -> None:
        with self._lock:
            self._fetched += size

    def _own(self) -> None:
        """Forget what a process that this one was forked from is fetching."""
        if self._pid != os.getpid():
            self._reset()


class _NoEnd(fetch.FetchError):
    """A shard of unknown size that ends without the zeros of a tar's end."""


class _Ahead:
    """An opened shard that a thread of its own fetches; the thread keeps no process from ending."""

    def __init__(self, action: Any) -> None:
        self._action = action
        self._value: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._action()
        except Exception as error:  # it is raised where the result is asked for
            self._error = error

    def result(self) -> IO[bytes]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[no-any-return]


def find_urls(name: str, texts: Sequence[str], remote: bool) -> list[str]:
    """The urls and commands that the entries of a dataset's path stand for, in order.

    Args:
        name: of the dataset, for messages.
        texts: urls with braces and `*`, or `pipe:` commands with numbers in braces.
        remote: whether the dataset's section allows it.

    Raises:
        ConfigError: not allowed, no shards, or nothing that can be read here.
        DataError: `*` stands for nothing.
    """
    key = f"datasets.{name}.path"
    if not remote:
        raise ConfigError(
            f"{key}: {fetch.shown(texts[0])!r} is not on this machine; to fetch shards while training, set"
            f" datasets.{name}.remote=true, or copy them to a disk"
        )
    urls: list[str] = []
    for text in texts:
        if not fetch.is_remote(text):
            raise ConfigError(
                f"{key}: {text!r} is on disk and others are not; make them two datasets, which are mixed"
            )
        fetch.check_url(text, key)
        command = fetch.scheme_of(text) == "pipe"
        for url in expand(text, numbers_only=command):
            found = fetch.listed(url, key) if "*" in url and not command else [url]
            urls += [one for one in found if found == [url] or one.endswith(".tar")]
    wrong = [url for url in urls if not url.startswith("pipe:") and not _parted(url)[1].endswith(".tar")]
    if wrong:
        raise ConfigError(
            f"{key}: {fetch.shown(wrong[0])!r} does not end in .tar; of urls only plain tar shards are read"
        )
    if not urls:
        raise DataError(f"{key}: no .tar file at {fetch.shown(texts[0])!r}")
    return urls


def probe_all(store: Store, chosen: Sequence[int]) -> list[BadRecord]:
    """What is wrong with some shards, in order."""
    with ThreadPoolExecutor(16) as pool:  # waits for the disk or the network
        return [error for error in pool.map(store.probe, chosen) if error is not None]


@contextmanager
def reading(store: Store, shard: int, ahead: bool) -> Iterator[IO[bytes]]:
    """An opened shard; with `ahead` the next one is fetched meanwhile."""
    if ahead and shard + 1 < len(store.labels):
        store.prefetch(shard + 1)
    with store.open(shard) as file:
        yield file


def _labels(urls: Sequence[str]) -> list[str]:
    """As the files are called below the folder that they have in common; commands by the file in them."""
    commands = [url for url in urls if url.startswith("pipe:")]
    if commands:
        files = [re.findall(r"[\w.-]+\.tar\b", url) for url in urls]
        labels = [found[-1] if found else url for found, url in zip(files, urls, strict=True)]
        return labels if len(set(labels)) == len(urls) else list(urls)
    parts = [fetch.shown(url).split("/") for url in urls]
    steps = zip(*(part[:-1] for part in parts), strict=False)  # as long as the shortest
    common = sum(1 for _ in takewhile(lambda some: len({*some}) == 1, steps))
    labels = ["/".join(part[common:]) for part in parts]
    return labels if len(set(labels)) == len(urls) else list(urls)


def _parted(url: str) -> tuple[str, str]:
    """Folder and file name of a url; a command has neither."""
    if url.startswith("pipe:"):
        return "", ""
    folder, _, file = url.partition("?")[0].rpartition("/")
    return folder, file


def _safe(name: str) -> str:
    """The end of a name, as part of a file name."""
    return re.sub(r"[^\w.-]", "_", name)[-60:]


def _sizes(content: bytes, place: str) -> dict[str, int]:
    try:
        return {str(name): int(size) for name, size in json.loads(content).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{place}: not a JSON object of file name -> number of samples ({error}); mend or delete it"
        ) from error
