"""Pictures and captions, of the web or of the disk -> webdataset shards as img2dataset lays them out.

Beside each `00000.tar` of key.jpg, key.txt and key.json lie `00000_stats.json`, which says that the shard is
done, and a table of all its rows, failed ones too; `sizes.json` has the number of samples of each shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from blip.atomic import write_file, write_text
from blip.data.datasets import Records
from blip.data.locate import Source
from blip.data.official.fetch import Web, WebError
from blip.data.readers import Record
from blip.data.samples import MALFORMED, BadRecord, read_image, sound
from blip.data.sources import found_kind, read_source
from blip.data.streams.stores import SIZES_FILE
from blip.data.streams.tars import add_sample
from blip.errors import ConfigError, DataError, UsageError

log = logging.getLogger(__name__)

SETTINGS_FILE = "packing.json"
"""Beside the shards: what they were made of and how, so that nothing else is added to them."""
ResizeMode = Literal["keep_ratio", "center_crop", "no"]


class Item(NamedTuple):
    """One picture to be."""

    content: Callable[[], bytes]
    """Gives the file; raises WebError or BadRecord."""
    record: Record
    """`caption`, a text, several, or None; `url`, and what else is known."""


@dataclass(frozen=True)
class Packing:
    """How shards are made."""

    image_size: int = 384
    """Of the shorter side, in pixels."""
    resize: ResizeMode = "keep_ratio"
    """`center_crop` also cuts to a square; `no` leaves pictures as large as they are."""
    only_if_bigger: bool = True
    """Whether smaller pictures stay as small as they are."""
    min_image_size: int = 0
    """Pictures whose shorter side is smaller are left out."""
    per_shard: int = 10_000
    """Rows that a shard is made of, failed ones too."""
    quality: int = 95
    """Of JPEG."""
    threads: int = 32
    """Pictures on their way at a time; it changes nothing else."""

    def __post_init__(self) -> None:
        for name in ("image_size", "per_shard", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is below 1")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality: {self.quality} is not between 1 and 100")


@dataclass
class Packed:
    """What became of the rows of all shards, those of earlier runs among them."""

    shards: int = 0
    done_before: int = 0
    """Shards that an earlier run had finished."""
    rows: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    """`success`, and why the others failed."""

    def line(self) -> str:
        """For people."""
        failed = ", ".join(f"{n} {cause}" for cause, n in self.causes.most_common() if cause != "success")
        before = f" ({self.done_before} of them finished before)" if self.done_before else ""
        private = "; --allow-private opens private addresses" if self.causes["private_address"] else ""
        return (
            f"{self.causes['success']} of {self.rows} rows in {self.shards} shards{before}"
            f"; failed: {failed or 'none'}{private}"
        )


def pack(
    items: Iterable[Item],
    folder: Path,
    packing: Packing,
    source: str,
    tell: Callable[[str], None] = log.info,
) -> Packed:
    """Write shards; finished ones are not made again.

    Args:
        items: in the same order each time.
        folder: of the shards.
        packing: how they are made.
        source: what the items are, in a line; shards of another source or made otherwise are not mixed.
        tell: takes a line for people, one per shard.

    Raises:
        UsageError: the folder has other shards, or cannot be written to.
        DataError: the list of items cannot be read.
    """
    packed = Packed()
    rows = iter(items)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings = _settings(folder, packing, source)
        with ThreadPoolExecutor(packing.threads) as pool:
            for number in itertools.count():
                chunk = list(itertools.islice(rows, packing.per_shard))
                if not chunk:
                    break
                if settings:
                    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
                    settings = {}
                stats = _finished(folder, number, len(chunk))
                packed.done_before += stats is not None
                if stats is None:
                    stats = _shard(chunk, folder, number, packing, pool)
                    tell(f"{folder}/{number:05d}.tar: {stats['successes']} of {stats['count']} rows")
                packed.shards += 1
                packed.rows += stats["count"]
                packed.causes.update(stats["status_dict"])
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return packed


def _settings(folder: Path, packing: Packing, source: str) -> dict[str, Any]:
    """What to note beside the shards; empty where it stands there already.

    Raises:
        UsageError: the folder has other shards.
    """
    settings = {"source": source, **asdict(packing)}
    del settings["threads"]
    place = folder / SETTINGS_FILE
    if place.is_file():
        known = json.loads(place.read_bytes())
        differing = [key for key in settings if known.get(key) != settings[key]]
        if differing:
            key = differing[0]
            raise UsageError(
                f"{folder}: its shards were made with {key} {known.get(key)!r}, not {settings[key]!r}; give"
                " another folder, or the same settings to go on"
            )
        return {}
    if any(folder.glob("*.tar")):
        raise UsageError(f"{folder}: has shards that are not of this command; give another folder")
    return settings


def _finished(folder: Path, number: int, count: int) -> dict[str, Any] | None:
    """The counts of a shard that an earlier run has finished."""
    with contextlib.suppress(OSError, ValueError):
        stats = json.loads((folder / f"{number:05d}_stats.json").read_bytes())
        # Where nothing came, there may have been no network, or addresses that are allowed by now.
        if stats["successes"] and stats["count"] == count and (folder / f"{number:05d}.tar").is_file():
            return stats
    return None


def _shard(
    chunk: list[Item], folder: Path, number: int, packing: Packing, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    """Write one shard, its table and its counts, in this order."""
    began = time.time()
    name = f"{number:05d}"
    width = max(4, len(str(packing.per_shard - 1)))
    table: list[Record] = []
    taken = [0]

    def write(path: Path) -> None:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for at, (picture, note, size) in enumerate(_in_order(chunk, packing, pool)):
                note = {**note, "key": f"{name}{at:0{width}d}"}
                table.append(note)
                taken[0] += size
                if picture is not None:
                    _add(tar, note, picture)

    place = folder / f"{name}.tar"
    write_file(place, write)
    causes = Counter(row["error_message"] or "success" for row in table)
    statuses = Counter(row["status"] for row in table)
    if not causes["success"]:
        place.unlink()  # an empty shard would only be in the way
    _write_table(folder, name, table)
    if causes["success"]:
        _note_size(folder, place.name, causes["success"])
    stats = {
        "count": len(table),
        "successes": causes["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "bytes_downloaded": taken[0],
        "duration": round(time.time() - began, 3),
        "start_time": began,
        "end_time": time.time(),
        "status_dict": dict(causes),
    }
    write_text(folder / f"{name}_stats.json", json.dumps(stats, indent=1) + "\n")
    return stats


def _in_order(
    chunk: list[Item], packing: Packing, pool: ThreadPoolExecutor
) -> Iterator[tuple[bytes | None, Record, int]]:
    """Results in the order of the items, with a few of them waiting in memory."""
    waiting: deque[Future[tuple[bytes | None, Record, int]]] = deque()
    for item in chunk:
        waiting.append(pool.submit(_make, item, packing))
        if len(waiting) > 4 * packing.threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _make(item: Item, packing: Packing) -> tuple[bytes | None, Record, int]:
    """(the picture as it is stored, what is known of it, bytes that were read); None where it failed."""
    blank = dict.fromkeys(("width", "height", "original_width", "original_height", "sha256"))
    note = {**item.record, "status": "success", "error_message": None, **blank, "exif": "{}"}
    content = b""
    try:
        content = item.content()
        picture, small, large = _resized(content, packing)
    except WebError as error:
        return None, {**note, "status": "failed_to_download", "error_message": error.cause}, len(content)
    except BadRecord as error:
        missing = error.cause in ("missing_image", "malformed_record", "no_url")
        status = "failed_to_download" if missing else "failed_to_resize"
        return None, {**note, "status": status, "error_message": error.cause}, len(content)
    sizes = {"width": small[0], "height": small[1], "original_width": large[0], "original_height": large[1]}
    return picture, {**note, **sizes, "sha256": hashlib.sha256(content).hexdigest()}, len(content)


def _resized(content: bytes, packing: Packing) -> tuple[bytes, tuple[int, int], tuple[int, int]]:
    """A JPEG of the size that is wanted, that size, and the size before."""
    image = read_image(content, "")
    before = image.size
    shorter = min(before)
    if shorter < packing.min_image_size:
        raise BadRecord("too_small", "")
    wanted = packing.image_size
    untouched = packing.resize == "no" or (packing.only_if_bigger and shorter <= wanted)
    square = packing.resize == "center_crop" and image.width != image.height
    if untouched and not square and image.format == "JPEG" and image.mode in ("RGB", "L"):
        return content, before, before
    image = _opaque(image)
    try:
        if not untouched:
            size = tuple(max(1, round(side * wanted / shorter)) for side in before)
            image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        if packing.resize == "center_crop":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=packing.quality)
    except (OSError, ValueError, MemoryError) as error:  # an extreme shape, which JPEG cannot have
        raise BadRecord("unreadable_image", "", str(error)) from error
    return buffer.getvalue(), image.size, before


def _opaque(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as img2dataset has it."""
    if image.mode.startswith("I"):  # 16 bits would be cut off, not scaled
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _add(tar: tarfile.TarFile, note: Record, picture: bytes) -> None:
    """Members of one sample."""
    caption = note.get("caption")
    first = next((text for text in caption if text), None) if isinstance(caption, list) else caption
    members = {"jpg": picture, "json": json.dumps(note, default=str).encode()}
    if isinstance(first, str):
        members["txt"] = first.encode("utf-8", "replace")
    add_sample(tar, note["key"], members)


def _write_table(folder: Path, name: str, table: list[Record]) -> None:
    """All rows of a shard, as parquet where there is a writer of it, else as JSON lines."""
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        with contextlib.suppress(pyarrow.ArrowException, UnicodeEncodeError):  # columns of mixed types
            columns = dict.fromkeys(key for row in table for key in row)
            content = pyarrow.table({key: [row.get(key) for row in table] for key in columns})
            write_file(folder / f"{name}.parquet", lambda path: parquet.write_table(content, path))
            return
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in table))


def _note_size(folder: Path, shard: str, size: int) -> None:
    place = folder / SIZES_FILE
    known = json.loads(place.read_bytes()) if place.is_file() else {}
    write_text(place, json.dumps({**known, shard: size}, indent=0) + "\n")


def of_web(records: Iterable[Record], web: Web, most_bytes: int, retries: int = 1) -> Iterator[Item]:
    """Items of a list of addresses.

    Args:
        records: with `url`, as `urls.read_urls` gives them.
        web: what opens addresses.
        most_bytes: of a picture.
        retries: further tries where there was no connection, or the server was busy.
    """
    for record in records:
        yield Item(_Download(record, web, most_bytes, retries), _noted(record))


def _noted(record: Record) -> Record:
    if MALFORMED in record:
        return {"url": None, "caption": None}
    return {"url": record.get("url"), "caption": record.get("caption"), **record}


@dataclass(frozen=True)
class _Download:
    """Gives the content of a record's address."""

    record: Record
    web: Web
    most_bytes: int
    retries: int

    def __call__(self) -> bytes:
        if MALFORMED in self.record:
            raise BadRecord("malformed_record", "", str(self.record[MALFORMED]))
        url = self.record.get("url")
        if not isinstance(url, str) or not url.strip():
            raise BadRecord("no_url", "")
        for left in range(max(0, self.retries), -1, -1):
            try:
                return self.web.get(url, self.most_bytes)
            except WebError as error:
                if not left or error.cause not in ("no_connection", "truncated", "http_429", "http_503"):
                    raise
        raise AssertionError("the last try returns or raises")


def on_disk(name: str, source: Source) -> Iterator[tuple[Record, Callable[[], bytes]]]:
    """The records of a located split, each with what gives its picture.

    Args:
        name: of the dataset.
        source: its files.

    Raises:
        DataError: they are shards already, or have no captions.
    """
    if source.layout == "shards":
        raise DataError(f"{name}: its files are shards already; copy them as they are")
    records = read_source(name, source, wanted="caption")
    kind = found_kind(source, records, "caption") if source.captioned else "pictures without captions"
    if kind != "caption":
        raise DataError(
            f"{name}: its records are of kind {kind}; shards hold pictures with captions, other data is read"
            " from its annotation files"
        )
    for number in range(len(records)):
        yield records[number], partial(_content, records, number)


def _content(records: Records, number: int) -> bytes:
    record = records[number]
    sound(record, "")
    if record.get("image") is None:
        raise BadRecord("missing_image", "")
    place = records.picture(number, record["image"])
    try:
        return place if isinstance(place, bytes) else Path(place).read_bytes()
    except OSError as error:
        raise BadRecord("missing_image", "", str(error)) from error


def of_disk(records: Iterable[tuple[Record, Callable[[], bytes]]]) -> Iterator[Item]:
    """Items of records whose pictures are at hand, as `on_disk` gives them."""
    for record, content in records:
        given = {} if MALFORMED in record else {key: v for key, v in record.items() if key != "image"}
        yield Item(content, {"caption": None, **given})
