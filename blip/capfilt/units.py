"""What CapFilt reads: pictures with the texts they come with, in units of work that are done or not.

A shard is a unit; pictures of annotation files are cut into units of equal size. A unit holds its pictures in
a fixed order, so that what is found about them can be written down line by line and gone on with anywhere.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from blip import keyed
from blip.config.schema import DatasetConfig
from blip.data.catalog import table as catalog
from blip.data.catalog.table import CATALOG
from blip.data.datasets import Records
from blip.data.locate import locate
from blip.data.pictures import number_pictures, picture_key
from blip.data.readers import detect
from blip.data.samples import BadRecord, Picture, SampleMaker, sound
from blip.data.sources import check_pictures, found_kind, read_source
from blip.data.streams.shards import ShardDataset
from blip.data.streams.tars import IMAGES, TEXTS, Ref, other_members, payload
from blip.engine.run_folder import file_name
from blip.errors import ConfigError, DataError

_STORED_AS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class WebText(NamedTuple):
    """A text that a picture comes with."""

    caption: Any
    """As it stands; normally a string."""
    record: int
    """Number of its record; of a shard's sample, its place among the sample's texts."""


class Entry(NamedTuple):
    """A picture and its texts, as they are stored."""

    name: str
    picture: Picture
    texts: list[WebText]


class TruthFiles(NamedTuple):
    """What is known of the embedded web scenes."""

    corrupted: Path
    """What was done to each text."""
    scenes: Path
    """What is in each picture."""


class Unit(Protocol):
    """Pictures that are worked on together, n of them."""

    @property
    def label(self) -> str:
        """Names the unit and its files."""
        ...

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Name of a picture, for messages."""
        ...

    def entry(self, number: int) -> Entry:
        """Picture `number` of the unit.

        Raises:
            BadRecord: it cannot be read, nor could what is said about it.
        """
        ...

    def close(self) -> list[BadRecord]:
        """What is wrong with the unit as a whole; files are let go of."""
        ...


@dataclass
class RecordPool:
    """Pictures of annotation files, image folders or Hugging Face folders; those of one picture together.

    Args:
        name: of the dataset.
        records: all of them.
        layout: of their files; `auto` where each tells its own.
        part_size: pictures of a unit.
        captioned: whether the records have texts.
        truth: files that tell what was done to the texts, and what is in the pictures.
    """

    name: str
    records: Records
    layout: str
    part_size: int
    captioned: bool = True
    truth: TruthFiles | None = None

    num_pictures: int = field(init=False)
    """Of all units."""

    def __post_init__(self) -> None:
        # Picture after picture, in order of appearance, with the records of each.
        pictures, self.num_pictures = self._pictures()
        self.order = np.argsort(pictures, kind="stable")
        self.starts = np.searchsorted(pictures[self.order], np.arange(self.num_pictures + 1))

    def _pictures(self) -> tuple[np.ndarray, int]:
        """Number of each record's picture, and how many there are."""
        records = self.records
        if self.layout == "hf":  # a look at each would read all of them
            return records.pictures, int(records.num_pictures)
        # By path alone: a text is judged beside its own picture, also where two files count `image_id` anew.
        places = ((i, records[i].get("image")) for i in range(len(records)))
        keys = (picture_key({"image": one}, i, records.origin(i)[1]) for i, one in places)
        return number_pictures(np.fromiter(keys, np.uint64, len(records)))

    def units(self) -> Sequence[RecordUnit]:
        """Runs of `part_size` pictures."""
        firsts = range(0, self.num_pictures, self.part_size)
        return [RecordUnit(self, number, first) for number, first in enumerate(firsts)]

    def members(self, picture: int) -> list[int]:
        """Numbers of the records of a picture."""
        return self.order[self.starts[picture] : self.starts[picture + 1]].tolist()

    def describe(self) -> dict[str, Any]:
        """Number of pictures and records, size of the units, and a key of some of the content."""
        some = range(0, len(self.records), max(1, len(self.records) // 1000))
        content = keyed.key(*(repr(sorted(self.records[i].items())) for i in some))
        return {
            "pictures": self.num_pictures,
            "records": len(self.records),
            "part_size": self.part_size,
            "content": f"{content:016x}",
        }


@dataclass
class RecordUnit:
    """Some consecutive pictures of annotation files."""

    pool: RecordPool
    number: int
    first: int
    label: str = field(init=False)

    def __post_init__(self) -> None:
        self.label = f"{self.number:05d}"

    def __len__(self) -> int:
        return min(self.pool.part_size, self.pool.num_pictures - self.first)

    def name(self, number: int) -> str:
        """The picture's first record, as training names it."""
        return f"{self.pool.name}/{self.pool.members(self.first + number)[0]}"

    def entry(self, number: int) -> Entry:
        """Picture `number` of the unit, with all its texts."""
        pool, name = self.pool, self.name(number)
        texts: list[WebText] = []
        place: Picture | None = None
        for member in pool.members(self.first + number):
            record = pool.records[member]
            sound(record, name)
            if place is None and record.get("image") is not None:
                place = pool.records.picture(member, record["image"])
            caption = record.get("caption") if pool.captioned else None
            texts += [WebText(one, member) for one in texts_of(caption)]
        if place is None:
            raise BadRecord("missing_image", name, "the record has no 'image'")
        return Entry(name, place, texts)

    @property
    def file(self) -> str:
        """Name of its shard, without the ending."""
        return self.label

    def member(self, number: int, content: bytes) -> tuple[str, str, bytes, dict[str, Any]]:
        """Key, ending, content and record of picture `number` in a shard.

        Args:
            number: of the picture.
            content: of its file.
        """
        pool = self.pool
        record = pool.records[pool.members(self.first + number)[0]]
        ending, content = as_stored(content, self.name(number))
        key = f"{self.label}{number:0{len(str(pool.part_size - 1))}d}"
        return key, ending, content, {k: v for k, v in record.items() if k not in ("image", "caption")}

    def others(self, number: int) -> dict[str, bytes]:
        """Nothing: a record has no more than that."""
        return {}

    def close(self) -> list[BadRecord]:
        """Nothing: bad records are told of one by one."""
        return []


@dataclass
class ShardPool:
    """Webdataset shards, here or elsewhere.

    Args:
        name: of the dataset.
        data: the shards.
        truth: files that tell what was done to the texts, and what is in the pictures.
    """

    name: str
    data: ShardDataset
    truth: TruthFiles | None = None

    @property
    def num_pictures(self) -> int:
        """Of all shards, where something tells; else estimated."""
        return self.data.num_samples

    def units(self) -> Sequence[ShardUnit]:
        """One per shard."""
        return [ShardUnit(self.data, number) for number in range(len(self.data.labels))]

    def describe(self) -> dict[str, Any]:
        """The shards' names."""
        return {"shards": len(self.data.labels), "content": f"{keyed.key(*self.data.labels):016x}"}


@dataclass
class ShardUnit:
    """A shard."""

    data: ShardDataset
    number: int
    _file: IO[bytes] | None = None
    _process: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None}

    @property
    def label(self) -> str:
        """Its number."""
        return f"{self.number:05d}"

    @property
    def file(self) -> str:
        """Name of the shard, without the ending."""
        return file_name(self.data.labels[self.number].removesuffix(".tar"))

    def member(self, number: int, content: bytes) -> tuple[str, str, bytes, dict[str, Any]]:
        """Key, ending, content and record of sample `number`, as they stand in the shard."""
        name = self.name(number)
        stored = self.data.stored_record(self.refs[number], self._opened(name), name)
        first = stored[0] if isinstance(stored, list) and stored else stored
        record = dict(first) if isinstance(first, dict) else {}
        record.pop(self.data.maker.columns.get("caption", "caption"), None)
        return self.refs[number].key, self.extension(number), content, record

    def others(self, number: int) -> dict[str, bytes]:
        """What else belongs to sample `number`, by ending."""
        name, own = self.name(number), self.refs[number].files
        rest = {e: p for e, p in own.items() if e not in TEXTS and e != self.extension(number)}
        places = self._others[number] | rest
        return {ending: payload(self._opened(name), place, name) for ending, place in places.items()}

    @cached_property
    def _scanned(self) -> list[Ref | BadRecord]:
        return list(self.data.scan(self.number))

    @cached_property
    def refs(self) -> list[Ref]:
        """The samples, in stored order."""
        return [entry for entry in self._scanned if isinstance(entry, Ref)]

    @cached_property
    def _others(self) -> list[dict[str, tuple[int, int]]]:
        return other_members(self._opened(self.label), self.refs)

    def __len__(self) -> int:
        return len(self.refs)

    def name(self, number: int) -> str:
        """Shard and key."""
        return f"{self.data.labels[self.number]}/{self.refs[number].key}"

    def entry(self, number: int) -> Entry:
        """Sample `number` of the shard, with all its texts."""
        ref, name = self.refs[number], self.name(number)
        extension = self.extension(number)
        record = self.data.stored_record(ref, self._opened(name), name)
        picture = payload(self._opened(name), ref.files[extension], name)
        column = self.data.maker.columns.get("caption", "caption")
        return Entry(name, picture, [WebText(t, i) for i, t in enumerate(captions_of(record, column))])

    def extension(self, number: int) -> str:
        """How the name of a sample's picture ends.

        Raises:
            BadRecord: it has none.
        """
        found = next((e for e in IMAGES if e in self.refs[number].files), None)
        if found is None:
            raise BadRecord("missing_image", self.name(number))
        return found

    def close(self) -> list[BadRecord]:
        """Where the shard breaks off, or why it cannot be read at all, if it has been looked at."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None
        for name in ("refs", "_others"):  # of millions of samples they would be gigabytes
            self.__dict__.pop(name, None)
        scanned = self.__dict__.pop("_scanned", ())
        return [entry for entry in scanned if isinstance(entry, BadRecord)]

    def _opened(self, name: str) -> IO[bytes]:
        """The shard's file; a forked worker opens its own, since a place in a file is shared."""
        if self._file is None or self._process != os.getpid():
            try:
                self._file, self._process = self.data.shards.open(self.number), os.getpid()
            except OSError as error:
                raise BadRecord("unreadable_shard", name, str(error)) from error
        return self._file


def captions_of(stored: Any, column: str) -> list[Any]:
    """All texts of a shard's sample: of its object, its list of objects or texts, or its one text."""
    several = stored if isinstance(stored, list) else [stored]
    found: list[Any] = []
    for one in several:
        found += texts_of(one.get(column) if isinstance(one, Mapping) else one)
    return found


def texts_of(caption: Any) -> list[Any]:
    """One or several texts as a list; nothing is none."""
    if caption is None:
        return []
    return list(caption) if isinstance(caption, list) else [caption]


def open_pool(
    name: str,
    section: DatasetConfig,
    split: str,
    part_size: int,
    data_root: str | Path | None = None,
    called: str = "",
) -> RecordPool | ShardPool:
    """The units of one split of a dataset.

    Args:
        name: of the section.
        section: the section.
        split: which of its splits.
        part_size: pictures of a unit, where they do not lie in shards.
        data_root: as `run.data_root`.
        called: what the units call it; empty: by its name.

    Raises:
        DataError: files or pictures are missing.
        ConfigError: its records are no pictures with captions, or none at all.
    """
    source = locate(name, section, split, data_root)
    if source.layout == "shards":
        maker = SampleMaker(None, str, columns=source.columns)  # type: ignore[arg-type]  # nothing is made
        data = ShardDataset(name, source.shards, maker, image_ids=False)
        return ShardPool(called or name, data, _truth(name, section, split, data_root))
    source.captioned = False  # a folder of pictures will do
    records = read_source(name, source, section.max_samples, wanted="caption")
    captioned = "caption" in records.columns
    if captioned and (kind := found_kind(source, records, "caption")) != "caption":
        raise ConfigError(
            f"datasets.{name}: its records are of kind {kind}; CapFilt reads pictures with captions"
        )
    if "image" not in records.columns:
        raise ConfigError(f"datasets.{name}: its records have no column 'image'; CapFilt reads pictures")
    check_pictures(name, records, SampleMaker(None, str), source.named)  # type: ignore[arg-type]
    if not len(records):
        raise DataError(f"datasets.{name}: no records")
    layout, truth = source.layout, _truth(name, section, split, data_root)
    if layout == "auto" and any(detect(path) == "hf" for path in source.paths):
        layout = "hf"
    return RecordPool(called or name, records, layout, part_size, captioned, truth)


def _truth(name: str, section: DatasetConfig, split: str, data_root: str | Path | None) -> TruthFiles | None:
    row = CATALOG.get(name) if section.path is None else None
    if row is None or split not in row.corrupted:
        return None
    root = catalog.data_root(data_root)
    return TruthFiles(root / row.corrupted[split], root / row.judged[split])


def number_of(name: str) -> int:
    """A picture's number below 2**40, which keys what is drawn for it: a function of its name."""
    return keyed.key("picture", name) >> 24


def batches(unit: Unit, size: int, start: int = 0) -> Iterator[range]:
    """Numbers of the unit's pictures, batch by batch, from the batch that begins at `start` on."""
    for first in range(start, len(unit), size):
        yield range(first, min(first + size, len(unit)))


def as_stored(content: bytes, name: str) -> tuple[str, bytes]:
    """Ending and content of a picture in a shard; what shards do not hold becomes PNG.

    Raises:
        BadRecord: it is no picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            if ending := _STORED_AS.get(opened.format or ""):
                return ending, content
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "png")
            return "png", buffer.getvalue()
    except (OSError, ValueError) as error:
        raise BadRecord("unreadable_image", name, str(error)) from error
