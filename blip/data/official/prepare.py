"""Official files -> our layout: says what is wanted and where, unpacks, converts, validates, adapts paths.

Files are taken as BLIP and LAVIS distribute them, or as their own authors do (`official.formats`). Nothing is
downloaded unless that is asked for.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip.atomic import write_file, write_text
from blip.data.catalog import table as catalog
from blip.data.catalog.rows import RENAMED, Official, Row
from blip.data.official.archives import holds, unpack
from blip.data.official.fetch import Web, fetch
from blip.data.official.formats import DOCUMENTS, FORMATS, document_of, records_of
from blip.data.official.pack import Packing, of_web, pack
from blip.data.official.paths import Downloads, PathMapper
from blip.data.official.urls import read_urls
from blip.data.readers import Record, detect, read_file
from blip.data.samples import MALFORMED, BadRecord
from blip.data.streams.shards import SIZES_FILE
from blip.data.streams.tars import find_shards, scan
from blip.errors import DataError, UsageError

PROBES = 500
"""Records per annotation file whose picture is looked for, evenly spread."""
DOWNLOADS = "downloads"
"""Folder below the data root of what was fetched, or unpacked from archives of annotations."""
MOST_BYTES = 1 << 25
"""Of a picture of the web: 32 MiB."""

_TEXTS = {
    "caption": "captions",
    "question": "questions",
    "sentence": "sentences",
    "text_output": "outputs",
    "conversations": "messages",
}
"""Column -> what its texts are called."""
_SIGNS = {
    "caption": ("caption", "caption_str"),
    "vqa": ("question",),
    "nlvr": ("images",),
    "classification": ("label",),
    "instruct": ("conversations",),
}
"""Kind of a row -> columns, one of which its records have, and records of other kinds have not."""


@dataclass
class Outcome:
    """What `prepare` did for one dataset."""

    lines: list[str] = field(default_factory=list)
    """For people, one step each."""
    missing: list[str] = field(default_factory=list)
    """What the user has to bring, with its place."""


def prepare(name: str, root: Path, downloads: Path | None = None, web: Web | None = None) -> Outcome:
    """Bring the files of a named dataset into place, as far as they are at hand.

    Args:
        name: in the catalogue.
        root: the data root.
        downloads: folder with the official files under their own names, or in subfolders; None: in place.
        web: what fetches files whose addresses the catalogue has; None: nothing is fetched.

    Returns:
        What was done and what is missing.

    Raises:
        UsageError: an embedded dataset, no such folder, or files of one name in it.
        DataError: unknown name, or a file that is damaged or cannot be fetched.
    """
    row = catalog.row(name)
    if row.embedded:
        raise UsageError(f"{name} is embedded and needs no files: run 'blip data make scenes'")
    if downloads is not None and not downloads.is_dir():
        raise UsageError(f"--from {downloads}: no such folder; give the one that holds the downloaded files")
    try:
        return _Preparation(row, root, downloads, web).run()
    except OSError as error:
        what = error.filename or root
        raise UsageError(f"{what}: cannot be read or written ({error.strerror or error})") from error


class _Preparation:
    """One dataset on its way into place."""

    def __init__(self, row: Row, root: Path, downloads: Path | None, web: Web | None) -> None:
        self.row, self.root, self.web = row, root, web
        self.set_name = row.files[0].split("/")[0]
        self.fetched = root / DOWNLOADS / self.set_name
        self.folders = [folder for folder in (downloads, self.fetched) if folder is not None]
        self.files = self._search()
        self.outcome = Outcome()
        self._records: dict[Path, Record] = {}

    def _search(self) -> Downloads:
        return Downloads([folder for folder in self.folders if folder.is_dir()], self.set_name)

    def run(self) -> Outcome:
        """Fetch, unpack, and bring each file into place."""
        row, outcome = self.row, self.outcome
        self._unpack()
        if self.web is not None:
            self._fetch()
            self._unpack()
        packed = row.urls is not None and self._pack()
        if row.format == "shards" or packed:
            _prepare_shards(self._patterns(), row, self.root, outcome)
            return outcome
        images = self.root / row.images
        column = row.columns.get("image", "image")
        mapper = PathMapper(images, row.suffix, column) if images.is_dir() else None
        if mapper is None:
            outcome.missing.append(f"{images}{os.sep}: {row.pictures}")
        absent: list[str] = []
        for target, splits in self._targets().items():
            if self._bring(target, splits, mapper, column):
                absent.append(str(self.root / target))
        for target in self._more():
            self._bring(target, Path(target).stem, mapper, column)
        for target in self._documents():
            if self._bring_document(target) and target in row.others:
                absent.append(str(self.root / target))
        if absent:
            outcome.missing.append(f"{', '.join(absent)}: {row.annotations}")
        return outcome

    def _patterns(self) -> list[str]:
        return self.row.files if self.row.format == "shards" else [self.row.downloaded]

    def _targets(self) -> dict[str, str]:
        """File of ours -> its splits, in words: one may hold several."""
        files: dict[str, list[str]] = {}
        for split in self.row.splits:
            for target in self.row.of(split):
                files.setdefault(target, []).append(split)
        return {target: " and ".join(splits) for target, splits in files.items()}

    def _more(self) -> list[str]:
        """Files of records that only variants of the set read, where they can be had."""
        made = [official.makes for official in self.row.takes if official.format in FORMATS]
        return [
            target for target in dict.fromkeys(made) if target not in self._targets() and self._own(target)
        ]

    def _documents(self) -> list[str]:
        """Files that are no lists of records: those that are read, and those that others like to have."""
        made = [official.makes for official in self.row.takes if official.format in DOCUMENTS]
        return list(dict.fromkeys([*self.row.others, *made]))

    def _found(self, target: str) -> Path | None:
        """The file itself: downloaded, under the set's name for it, or with that in front; or in place."""
        place = Path(target)
        renamed = [one.files[0] for one in self.row.takes if (one.makes, one.format) == (target, RENAMED)]
        # The plain name is the last one: other sets, too, have an answer_list.json.
        found = self.files.one(f"{place.parent.parent.name}_{place.name}", *renamed, place.name)
        return found or (self.root / target if (self.root / target).is_file() else None)

    def _sources(self, target: str) -> tuple[Official, list[Path]] | None:
        """The official files that a target can be made of, where all are there."""
        for official in self.row.takes:
            if official.makes != target or official.format == RENAMED:
                continue
            own = self.root / target
            paths = [
                self.files.one(names) or (own if own.name == names and own.is_file() else None)
                for names in official.files
            ]
            if all(paths):
                return official, [path for path in paths if path is not None]
        return None

    def _own(self, target: str) -> Path | None:
        """As `_found`, but for files of other sets, many of which are called train.json or so, too."""
        found, place = self._found(target), self.root / target
        if found is None or not self._foreign(found):
            return found
        return place if found != place and place.is_file() and not self._foreign(place) else None

    def _foreign(self, path: Path) -> str:
        """The columns of a file, where they tell that it belongs to another set; empty: it may be ours."""
        record = self._first(path)
        kind = "caption" if self.row.kind == "retrieval" else self.row.kind
        strange = not any(sign in record for sign in _SIGNS[kind])
        strange &= any(sign in record for signs in _SIGNS.values() for sign in signs)
        strange |= "correct_choice" in self.row.columns and "choices" not in record
        column = self.row.columns.get("image")
        strange |= (column or "image") not in record and (column is not None or "img" in record)
        return ", ".join(record) if strange and record else ""

    def _first(self, path: Path) -> Record:
        """The first good record of a file; empty where it has none."""
        if path not in self._records:
            records = read_file(path, detect(path))
            self._records[path] = next((record for record in records if MALFORMED not in record), {})
        return self._records[path]

    def _bring(self, target: str, split: str, mapper: PathMapper | None, column: str) -> bool:
        """Bring one file of records into place; True: it is missing."""
        place, found = self.root / target, self._own(target)
        made = self._sources(target) if found is None or not _is_ours(self._first(found), column) else None
        if made is not None:
            official, paths = made
            moved = _write(records_of(official, paths), place, mapper)
            names = " and ".join(str(path) for path in paths)
            self.outcome.lines.append(
                f"{split}: made of {names}" + (f", {moved} image paths adapted" if moved else "")
            )
            found = place
        if found is None:
            if (other := self._found(target)) is not None:
                self.outcome.missing.append(
                    f"{place}: not {other}, which is another set's: its records have {self._foreign(other)}"
                )
            return True
        self._records.pop(place, None)
        self.outcome.lines += _prepare_file(split, found, place, mapper, column, self.outcome.missing)
        return False

    def _bring_document(self, target: str) -> bool:
        place, found = self.root / target, self._found(target)
        if found is None and (made := self._sources(target)):
            official, paths = made
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, json.dumps(document_of(official, paths)) + "\n")
            self.outcome.lines.append(f"made {place} of {' and '.join(str(path) for path in paths)}")
            return False
        if found is None:
            return True
        if found != place:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_file(place, lambda partial: _copy(found, partial))
            self.outcome.lines.append(f"copied {found} to {place}")
        return False

    def _unpack(self) -> None:
        """Unpack the archives that are at hand, and look through what has come."""
        notes: list[Path] = []
        for archive in self.row.archives:
            for path in self.files.every(archive.names):
                if not holds(path, archive.holds):
                    continue
                print(f"unpacking {path} into {self.root / archive.to}", flush=True)
                done = unpack(path, self.root / archive.to)
                notes += done.notes
                if done.written or done.refused:
                    self.outcome.lines.append(f"{path} into {self.root / archive.to}: {done.line()}")
        self.files = self._search()
        self.files.add(notes)  # some archives have annotations among their pictures

    def _fetch(self) -> None:
        """Fetch what is neither in place nor at hand, and has an address."""
        assert self.web is not None
        checks = {name: archive.check for archive in self.row.archives for name in archive.names.split("|")}
        for name in self._wanted():
            if name in self.row.remote:
                fetch(self.row.remote[name], self.fetched / name, self.web, checks.get(name, ""), tell=print)
                self.outcome.lines.append(f"fetched {self.fetched / name}")
        self.files = self._search()

    def _wanted(self) -> Iterator[str]:
        """Names of the files and archives that would complete the set."""
        row = self.row
        for target in [*self._targets(), *row.others]:
            place = Path(target)
            made = [official for official in row.takes if official.makes == target]
            own = self._found(target) if target in row.others else self._own(target)
            if own or self._sources(target) or row.format == "shards":
                continue
            names = [f"{place.parent.parent.name}_{place.name}", place.name]
            names += [official.files[0] for official in made if len(official.files) == 1]
            packed = [a.names for a in row.archives if place.suffix and a.to.startswith(DOWNLOADS)]
            known = next((name for name in names if name in row.remote), None)
            yield from [known] if known else [name for name in packed if name in row.remote]
        if row.urls is not None:
            absent = [some for some in row.urls.files if not self.files.one(some)]
            yield from (name for some in absent for name in some.split("|"))
        for archive in (a for a in row.archives if not a.to.startswith(DOWNLOADS)):
            there = (self.root / archive.folder).is_dir()
            if archive.folder and not there and not any(self.files.every(archive.names)):
                yield from archive.names.split("|")

    def _pack(self) -> bool:
        """Download the pictures of a list of addresses into shards; whether there are such shards."""
        urls = self.row.urls
        assert urls is not None
        folder = self.root / urls.shards
        paths = list(dict.fromkeys(self.files.one(names) for names in urls.files))
        have = [path for path in paths if path is not None]
        in_place = all((self.root / target).is_file() for target in self._targets())
        if len(have) == len(paths) and self.web is not None and not in_place:
            records = read_urls(have, columns=urls.columns)
            print(f"{folder}: downloading the pictures of {' and '.join(map(str, have))}", flush=True)
            source = ", ".join(f"{path.name} of {path.stat().st_size} bytes" for path in have)
            done = pack(of_web(records, self.web, MOST_BYTES), folder, Packing(), source, print)
            self.outcome.lines.append(f"{folder}: {done.line()}")
        return any(folder.glob("*.tar")) and not in_place


def _is_ours(record: Record, column: str) -> bool:
    """Whether the first good record of a file names a picture or video, as BLIP's and LAVIS's files do."""
    # Without any it is read, and told to be empty.
    return not record or any(key in record for key in (column, "image", "images", "video", "img"))


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _write(records: Iterable[Record], target: Path, mapper: PathMapper | None) -> int:
    """Write records, one per line, as a list or as JSONL; the number of paths that were adapted.

    What stood at `target` is kept as `.orig`, unless it is the same.
    """
    per_line = target.suffix == ".jsonl"
    moved = 0

    def write(path: Path) -> None:
        nonlocal moved
        empty = True
        with path.open("w", encoding="utf-8") as file:
            for record in records:
                record, adapted = _adapted(record, mapper)
                moved += adapted
                before = "" if per_line else "[\n" if empty else ",\n"
                file.write(before + json.dumps(record) + ("\n" if per_line else ""))
                empty = False
            if empty:
                raise DataError(f"{target}: nothing to write; the files that it is made of hold no records")
            if not per_line:
                file.write("\n]\n")
        original = target.with_suffix(target.suffix + ".orig")
        changed = target.is_file() and not filecmp.cmp(path, target, shallow=False)
        if changed and not original.exists():
            shutil.copy2(target, original)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, write)
    return moved


def _adapted(record: Record, mapper: PathMapper | None) -> tuple[Record, int]:
    """A record with paths below our folder of pictures, and how many of them are other ones."""
    if mapper is None or MALFORMED in record:
        return record, 0
    changed = dict(record)
    if record.get(mapper.column) is not None:
        changed[mapper.column] = mapper(str(record[mapper.column]))
    if isinstance(record.get("video"), str):
        changed["video"] = mapper(record["video"])
    if isinstance(record.get("images"), list):
        changed["images"] = [mapper(str(image)) for image in record["images"]]
    pairs = zip(_images(record, mapper.column), _images(changed, mapper.column), strict=True)
    return changed, sum(one != other for one, other in pairs)


def _prepare_file(
    split: str, official: Path, target: Path, mapper: PathMapper | None, column: str, missing: list[str]
) -> list[str]:
    """Validate an annotation file, and write it with relative paths where that changes anything."""
    records = malformed = absolute = moved = 0
    counts = Counter[str]()
    for record in read_file(official, detect(official)):
        records += 1
        malformed += MALFORMED in record
        counts.update({noun: _count(record.get(key)) for key, noun in _TEXTS.items() if key in record})
        images = _images(record, column)
        absolute += sum(map(os.path.isabs, images))
        moved += sum(mapper(image) != image for image in images) if mapper is not None else 0
    if not records:
        raise DataError(f"{official}: holds no records; is the download complete?")
    found = "".join(f", {count} {noun}" for noun, count in counts.items())
    lines = [f"{split}: {records} records{found} in {official}"]
    if malformed:
        lines.append(f"{split}: {malformed} malformed records, which training will skip")
    if absolute and mapper is None:
        missing.append(
            f"{target}: {absolute} absolute image paths; run this again when the pictures are there"
        )
    if moved or official != target:
        _write(read_file(official, detect(official)), target, mapper)
        lines.append(f"{split}: wrote {target}" + (f", {moved} image paths adapted" if moved else ""))
    if mapper is not None:
        lines += _probe(split, target, records, mapper, missing)
    return lines


def _probe(split: str, path: Path, records: int, mapper: PathMapper, missing: list[str]) -> list[str]:
    """How many of some pictures are there."""
    step = max(1, records // PROBES)
    some = (record for i, record in enumerate(read_file(path, detect(path))) if i % step == 0)
    probed = [image for record in some for image in _images(record, mapper.column) or [""]]
    absent = [image for image in probed if not mapper.has(image)]
    if absent:
        share = len(absent) / len(probed)
        missing.append(
            f"{mapper.root / absent[0]}: this and about {share:.0%} of the pictures of {path.name}"
        )
    return [f"{split}: {len(probed) - len(absent)} of {len(probed)} pictures looked for are there"]


def _images(record: dict[str, Any], column: str) -> list[str]:
    """The image paths of a record, one of which stands in a column of this name."""
    images = record.get("images")
    if isinstance(record.get("video"), str):
        return [record["video"]]
    return [str(image) for image in (images if isinstance(images, list) else [record.get(column) or ""])]


def _count(texts: Any) -> int:
    return len(texts) if isinstance(texts, list) else 1


def _prepare_shards(patterns: list[str], row: Row, root: Path, outcome: Outcome) -> None:
    """Count the samples of shards, and write the counts beside them, so that no run has to."""
    (pattern,) = patterns
    try:
        paths = find_shards(pattern, root)
    except DataError:
        outcome.missing.append(f"{root / pattern}: {row.pictures}")
        return

    sizes: dict[Path, dict[str, int]] = {}
    broken = []
    for number, path in enumerate(paths):
        entries = list(scan(path, number, path.name))
        bad = [entry for entry in entries if isinstance(entry, BadRecord)]
        broken += [str(error) for error in bad]
        sizes.setdefault(path.parent, {})[path.name] = len(entries) - len(bad)
    for folder, counts in sizes.items():
        write_text(folder / SIZES_FILE, json.dumps(counts, indent=0) + "\n")
    total = sum(sum(counts.values()) for counts in sizes.values())
    outcome.lines.append(
        f"{total} samples in {len(paths)} shards; counts written to {SIZES_FILE} beside them"
    )
    outcome.missing += [f"{error}: fetch this shard again" for error in broken]


def wanted(name: str, root: Path) -> list[str]:
    """Files and folders of a named dataset that are not on disk."""
    row = catalog.row(name)
    if row.downloaded and any(root.glob(row.downloaded)):
        return []
    places: list[Any] = []
    for text in [*row.files, *row.others]:
        if row.format == "shards":
            try:
                find_shards(text, root)
            except DataError:
                places.append(text)
        elif not (root / text).is_file():
            places.append(text)
    if row.images and not (root / row.images).is_dir():
        places.append(row.images + "/")
    return places
