"""What is kept, as a dataset of the same format as the one it was made from, with each text's provenance.

JSON, JSONL, CSV and TSV give one record per text: the picture's own one, with `caption`, and in `provenance`
where the text is from. Shards keep their names and pictures: a sample's JSON has the kept texts under
`caption` and an entry for each in `provenance`, and its other members; one without any is left out. Folders
of pictures give JSONL; Hugging Face folders, which hold pictures, give shards.
"""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from blip.atomic import write_file, write_text
from blip.capfilt.journal import Journal
from blip.capfilt.units import RecordPool, RecordUnit, ShardPool, ShardUnit
from blip.data.readers import detect
from blip.data.samples import BadRecord
from blip.data.streams.stores import SIZES_FILE
from blip.data.streams.tars import add_sample
from blip.errors import DataError

PROVENANCE = "provenance"
FORMATS = ("json", "jsonl", "csv", "tsv")
_TABLES = ("csv", "tsv")
_HALF = re.compile("[\ud800-\udfff]")


class Made(NamedTuple):
    """A dataset that was written."""

    paths: list[str]
    """Its files, or the folder of its shards, below that of all datasets."""
    images: list[str]
    """For each file the folder that its pictures' paths start from; empty for shards."""
    texts: int
    """Kept; of shards, samples that any text is kept of."""


Choose = Callable[[Mapping[str, Any]], list[dict[str, Any]]]
"""A line of the journal -> the texts that are kept."""


class Provenance(NamedTuple):
    """What is told of every text beside its scores."""

    captioner: str | None
    filter: str | None
    round: int

    def of(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Origin, scores and the models behind them."""
        found: dict[str, Any] = {"origin": text["origin"]}
        found |= {name: text[name] for name in ("itm", "itc") if name in text}
        if text["origin"] == "synthetic":
            found["captioner"] = self.captioner
        if self.filter is not None:
            found["filter"] = self.filter
        return found | {"round": self.round}


def in_shards(pool: RecordPool | ShardPool) -> bool:
    """Whether a pool's output is shards, each a unit of its own; else it is written in one go."""
    return isinstance(pool, ShardPool) or pool.layout == "hf"


def write_shard(
    unit: RecordUnit | ShardUnit, journal: Journal, folder: Path, choose: Choose, told: Provenance
) -> int:
    """Write the shard of a unit, if anything of it is kept; returns the number of its samples."""
    place = folder / f"{unit.file}.tar"
    samples = 0

    def write(path: Path) -> None:
        nonlocal samples
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for number, line in enumerate(journal.lines()):
                if texts := choose(line):
                    _check(unit, number, line)
                    _add(tar, unit, number, texts, told)
                    samples += 1

    write_file(place, write)
    unit.close()
    if not samples:
        place.unlink()  # an empty shard would only be in the way
    return samples


def _check(unit: RecordUnit | ShardUnit, number: int, line: Mapping[str, Any]) -> None:
    """Raise where a unit has another picture, or none, where one was judged."""
    name = unit.name(number) if number < len(unit) else None
    if name != line["picture"]:
        why = "; ".join(map(str, unit.close())) or f"{name or 'nothing'} is in its place"
        raise DataError(
            f"{line['picture']}: it was there when its texts were judged, and is not any more ({why}); put"
            " the same files back, and go on with run.resume=auto"
        )


def _add(
    tar: tarfile.TarFile,
    unit: RecordUnit | ShardUnit,
    number: int,
    texts: list[dict[str, Any]],
    told: Provenance,
) -> None:
    try:
        picture = unit.entry(number).picture
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        key, ending, content, record = unit.member(number, content)
        others = unit.others(number)
    except (BadRecord, OSError) as error:
        raise DataError(
            f"{unit.name(number)}: it could be read before, and cannot any more ({error})"
        ) from error
    captions = [text["caption"] for text in texts]
    note = {**record, "caption": captions[0] if len(captions) == 1 else captions}
    note[PROVENANCE] = [told.of(text) for text in texts]
    members = {ending: content, "json": json.dumps(note, default=str).encode(), "txt": captions[0].encode()}
    add_sample(tar, key, members | {ending: one for ending, one in others.items() if ending not in members})


def write_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Tell how many samples each shard has."""
    write_text(folder / SIZES_FILE, json.dumps(dict(sorted(sizes.items())), indent=0) + "\n")


def write_records(
    pool: RecordPool, journals: Sequence[Journal], folder: Path, choose: Choose, told: Provenance
) -> Made:
    """Write annotation files, one for each that was read, of equal name and format."""
    files = _Files(pool, folder)
    tables = [name for name in files.names.values() if _format(name) in _TABLES]
    columns = _columns(_kept(pool, journals, choose, told)) if tables else {}
    folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def write(paths: Mapping[str, Path]) -> None:
        nonlocal count
        with ExitStack() as stack:
            writers = {
                file: _Writer(stack.enter_context(_opened(path)), _format(name), columns)
                for file, (path, name) in ((f, (paths[f], n)) for f, n in files.names.items())
            }
            for file, record in _kept(pool, journals, choose, told):
                writers[file].put(record)
                count += 1
            for writer in writers.values():
                writer.end()

    _write_together({file: folder / name for file, name in files.names.items()}, write)
    return Made([f"{folder.name}/{name}" for name in files.names.values()], list(files.roots.values()), count)


def _write_together(places: Mapping[str, Path], write: Callable[[Mapping[str, Path]], None]) -> None:
    """As `write_file`, for several files."""
    (first, place), *others = places.items()

    def nested(rest: Sequence[tuple[str, Path]], opened: dict[str, Path]) -> None:
        if not rest:
            write(opened)
            return
        (file, path), *more = rest
        write_file(path, lambda partial: nested(more, {**opened, file: partial}))

    nested([(first, place), *others], {})


def _opened(path: Path) -> TextIO:
    """For bytes that are no UTF-8, too, which come back as they were."""
    return path.open("w", encoding="utf-8", errors="surrogateescape", newline="")


class _Files:
    """The files that records come from: what is written for each, and where its pictures are."""

    def __init__(self, pool: RecordPool, folder: Path) -> None:
        self.names: dict[str, str] = {}
        self.roots: dict[str, str] = {}
        for picture in range(pool.num_pictures):
            for member in pool.members(picture):
                file, root = pool.records.origin(member)
                if file not in self.names:
                    self.names[file] = self._free(Path(file), pool)
                    self.roots[file] = str(Path(root).resolve())

    def _free(self, file: Path, pool: RecordPool) -> str:
        """A name like that of the file, which no other one has."""
        stem, _, ending = file.name.removesuffix(".gz").rpartition(".")
        if file.is_dir() or not stem:
            stem, ending = file.name or pool.name, "jsonl"
        elif ending.lower() not in FORMATS:
            told = pool.layout if pool.layout != "auto" else detect(file)
            ending = told if told in FORMATS else "jsonl"
        taken = set(self.names.values())
        number, found = 1, f"{stem}.{ending}"
        while found in taken:
            number += 1
            found = f"{stem}-{number}.{ending}"
        return found


def _format(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _kept(
    pool: RecordPool, journals: Sequence[Journal], choose: Choose, told: Provenance
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file that it came from, record) of every text that is kept, picture after picture."""
    picture = 0
    for unit, journal in zip(pool.units(), journals, strict=True):
        for line in journal.lines():
            members = pool.members(picture)
            picture += 1
            for text in choose(line):
                member = text.get("record", members[0])
                record = {key: v for key, v in pool.records[member].items() if not _ours(key)}
                yield (
                    pool.records.origin(member)[0],
                    {**record, "caption": text["caption"], PROVENANCE: told.of(text)},
                )
        unit.close()


def _ours(key: str) -> bool:
    """Whether a column is written anew; a table that CapFilt wrote has what an earlier run told."""
    return key == "caption" or key.startswith(f"{PROVENANCE}_")


def _columns(records: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, None]:
    """All columns of a table."""
    return dict.fromkeys(key for _, record in records for key in _flat(record))


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as columns of its own, and what a table cannot hold as JSON."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key == PROVENANCE:
            found |= {f"{PROVENANCE}_{name}": one for name, one in value.items()}
        else:
            found[key] = json.dumps(value) if isinstance(value, dict | list) else value
    return found


class _Writer:
    """Records into one file."""

    def __init__(self, file: TextIO, layout: str, columns: Iterable[str]) -> None:
        self._file, self._layout, self._first = file, layout, True
        self._columns = list(columns)
        if layout in _TABLES:
            self._row(self._columns)

    def put(self, record: Mapping[str, Any]) -> None:
        """Add a record."""
        if self._layout in _TABLES:
            values = _flat(record)
            self._row(["" if (value := values.get(name)) is None else str(value) for name in self._columns])
            return
        text = json.dumps(record, ensure_ascii=False, default=str)
        # Half a character, as a field that was cut off has it, has no bytes.
        text = _HALF.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
        if self._layout == "json":
            self._file.write(("[\n" if self._first else ",\n") + text)
        else:
            self._file.write(text + "\n")
        self._first = False

    def end(self) -> None:
        """Finish the file."""
        if self._layout == "json":
            self._file.write("[]\n" if self._first else "\n]\n")

    def _row(self, values: Sequence[str]) -> None:
        if self._layout == "csv":
            csv.writer(self._file, lineterminator="\n").writerow(values)
        else:  # such tables have no quotes, so a text has no tabs and lines
            self._file.write("\t".join(re.sub(r"[\t\r\n]+", " ", value) for value in values) + "\n")
