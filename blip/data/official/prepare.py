"""Official files -> our layout: says what is wanted and where, validates what is there, makes paths relative.

Nothing is downloaded and no archive is unpacked; both are left to the user, who is told which.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from blip.atomic import write_file, write_text
from blip.data.catalog import table as catalog
from blip.data.catalog.table import Row
from blip.data.readers import detect, read_file
from blip.data.samples import MALFORMED, BadRecord
from blip.data.shards import SIZES_FILE
from blip.data.tars import find_shards, scan
from blip.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from blip.errors import DataError, UsageError

PROBES = 500
"""Records per annotation file whose picture is looked for, evenly spread."""

_TRIES = 20
_TEXTS = {
    "caption": "captions",
    "question": "questions",
    "sentence": "sentences",
    "text_output": "outputs",
    "conversations": "messages",
}
"""Column -> what its texts are called."""


@dataclass
class Outcome:
    """What `prepare` did for one dataset."""

    lines: list[str] = field(default_factory=list)
    """For people, one step each."""
    missing: list[str] = field(default_factory=list)
    """What the user has to bring, with its place."""


def prepare(name: str, root: Path, downloads: Path | None = None) -> Outcome:
    """Bring the files of a named dataset into place, as far as they are at hand.

    Args:
        name: in the catalogue.
        root: the data root.
        downloads: folder with the official annotation files under their own names; None: already in place.

    Returns:
        What was done and what is missing.

    Raises:
        UsageError: an embedded dataset, or no such folder.
        DataError: unknown name, or an annotation file that is damaged.
    """
    row = catalog.row(name)
    if row.embedded:
        raise UsageError(f"{name} is embedded and needs no files: run 'blip data make scenes'")
    if downloads is not None and not downloads.is_dir():
        raise UsageError(f"--from {downloads}: no such folder; give the one that holds the downloaded files")
    outcome = Outcome()
    if row.format == "shards":
        _prepare_shards(row, root, outcome)
        return outcome
    images = root / row.images
    column = row.columns.get("image", "image")
    mapper = PathMapper(images, row.suffix, column) if images.is_dir() else None
    if mapper is None:
        outcome.missing.append(f"{images}{os.sep}: {row.pictures}")
    absent: list[str] = []
    files: dict[Path, list[str]] = {}
    for split in row.splits:
        for target in (root / text for text in row.of(split)):
            files.setdefault(target, []).append(split)
    for target, splits in files.items():
        official = _find(target, downloads)
        if official is None:
            absent.append(str(target))
        else:
            held = " and ".join(splits)  # a file may hold several
            outcome.lines += _prepare_file(held, official, target, mapper, column, outcome.missing)
    for target in (root / text for text in row.others):
        official = _find(target, downloads)
        if official is None:
            absent.append(str(target))
        elif official != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(official, target)
            outcome.lines.append(f"copied {official} to {target}")
    if absent:
        outcome.missing.append(f"{', '.join(absent)}: {row.annotations}")
    return outcome


def _find(target: Path, downloads: Path | None) -> Path | None:
    """The file to take: in `downloads`, perhaps with the set's name in front; else the one in place."""
    names = (f"{target.parent.parent.name}_{target.name}", target.name)
    found = [downloads / n for n in names if (downloads / n).is_file()] if downloads else []
    return found[0] if found else target if target.is_file() else None


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
        _rewrite(official, target, mapper)
        lines.append(f"{split}: wrote {target}" + (f", {moved} image paths adapted" if moved else ""))
    if mapper is not None:
        lines += _probe(split, target, records, mapper, missing)
    return lines


def _rewrite(official: Path, target: Path, mapper: PathMapper | None) -> None:
    """Write records, one per line, as a list or as JSONL; what stood at `target` is kept as `.orig`."""
    per_line = target.suffix == ".jsonl"

    def lines() -> Iterator[str]:
        for number, record in enumerate(read_file(official, detect(official))):
            if mapper is not None and record.get(mapper.column) is not None:
                record = {**record, mapper.column: mapper(str(record[mapper.column]))}
            if mapper is not None and isinstance(record.get("video"), str):
                record = {**record, "video": mapper(record["video"])}
            if mapper is not None and isinstance(record.get("images"), list):
                record = {**record, "images": [mapper(image) for image in _images(record, mapper.column)]}
            before = "" if per_line else "[\n" if number == 0 else ",\n"
            yield before + json.dumps(record) + ("\n" if per_line else "")
        if not per_line:
            yield "\n]\n"

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(lines())

    target.parent.mkdir(parents=True, exist_ok=True)
    original = target.with_suffix(target.suffix + ".orig")
    if target.is_file() and not original.exists():
        shutil.copy2(target, original)
    write_file(target, write)


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


class PathMapper:
    """Image paths as an annotation has them -> paths below the folder of pictures.

    A path that exists below the folder stays. Of any other, leading folders are dropped until it exists
    (`/export/.../VG_100K/1.jpg` -> `VG_100K/1.jpg`); else a picture of that name is looked for in the whole
    folder; else it stays as it is.

    Args:
        root: folder of the pictures.
        suffix: added to names that have none.
        column: of the annotations that holds the paths.
    """

    def __init__(self, root: Path, suffix: str = "", column: str = "image") -> None:
        self.root = root
        self.suffix = suffix
        self.column = column
        self._parents: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._names: dict[str, str] | None = None

    def __call__(self, image: str) -> str:
        if self.suffix and not image.lower().endswith(IMAGE_SUFFIXES):
            image += self.suffix
        parent, _, name = image.rpartition("/")
        if parent in self._parents:
            return str(PurePosixPath(self._parents[parent], name))
        if self._failures.get(parent, 0) < _TRIES:
            parts = [part for part in parent.split("/") if part not in ("", ".", "..")]
            for start in range(len(parts) + 1):
                folder = "/".join(parts[start:])
                if self.has(os.path.join(folder, name)):
                    self._parents[parent] = folder
                    return str(PurePosixPath(folder, name))
            self._failures[parent] = self._failures.get(parent, 0) + 1
        return self._by_name().get(name, image)

    def has(self, image: str) -> bool:
        """Whether a picture is there; a video file, or the folder of its frames."""
        place = self.root / image
        return place.is_file() or (place.suffix.lower() in VIDEO_SUFFIXES and place.with_suffix("").is_dir())

    def _by_name(self) -> dict[str, str]:
        """Name -> path of every picture or video file whose name occurs once."""
        if self._names is None:
            found: dict[str, str | None] = {}
            for folder, _, names in os.walk(self.root):
                for name in names:
                    if name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)):
                        path = (Path(folder) / name).relative_to(self.root).as_posix()
                        found[name] = None if name in found else path
            self._names = {name: path for name, path in found.items() if path is not None}
        return self._names


def _prepare_shards(row: Row, root: Path, outcome: Outcome) -> None:
    """Count the samples of shards, and write the counts beside them, so that no run has to."""
    (pattern,) = row.files
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
