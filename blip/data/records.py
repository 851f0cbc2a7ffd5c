"""Annotations in any format -> records in flat memory, that workers read without copying.

Python objects would be copied page by page into every forked worker, because reading one changes its
reference count; here all records are one byte array. A million records of 100 bytes of JSON take 140 MB.
"""

from __future__ import annotations

import itertools
import marshal
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip.data.pictures import hashed, number_pictures, picture_key
from blip.data.readers import NO_CAPTIONS, Record, detect, instead, read_file
from blip.data.samples import MALFORMED
from blip.data.video import IMAGE_SUFFIXES
from blip.errors import DataError, hint

COLUMNS = {
    "image": ("image", "file_name", "filename", "image_path", "filepath", "file", "path"),
    "images": ("images",),
    "video": ("video", "clip_name"),
    "caption": ("caption", "captions", "text", "caption_str"),
    "image_id": ("image_id", "img_id"),
    "instance_id": ("instance_id",),
    "question": ("question",),
    "question_id": ("question_id",),
    "question_type": ("question_type",),
    "answer_type": ("answer_type",),
    "answer": ("answer", "direct_answers"),
    "answers": ("answers",),
    "sentence": ("sentence",),
    "label": ("label",),
    "text_input": ("text_input",),
    "text_output": ("text_output",),
    "conversations": ("conversations",),
    "type": ("type",),
    "prompt": ("prompt",),
    "choices": ("choices",),
    "correct_choice": ("correct_choice", "correct_choice_idx"),
    "context": ("context",),
    "history": ("history",),
    "ocr_tokens": ("ocr_tokens",),
    "weight": ("weight",),
}
"""Our columns, each with the names it is looked for under, best first, where `columns` says nothing."""

Required = Sequence[tuple[str, ...]] | Callable[[Sequence[str]], Sequence[tuple[str, ...]]]
"""Columns without which data is useless, of several in one entry any; or what tells them from our names of
the columns that there are."""

_LOOKED_AT = 100
"""Records at the start of a file that are searched for the columns."""


class PackedRecords:
    """Records in one byte array; picklable, and shared by forked workers.

    Args:
        records: with our column names.
        roots: for each file, the folder its image paths start from.
        starts: number of the first record of each file; may grow while `records` moves from file to file.
        files: names of the files, for messages.
        columns: our names of the columns; may grow likewise.
    """

    def __init__(
        self,
        records: Iterable[Record],
        roots: Sequence[str] = ("",),
        starts: list[int] | None = None,
        files: Sequence[str] = ("",),
        columns: Sequence[str] = (),
    ) -> None:
        blob, ends, keys, counts = bytearray(), array("q", [0]), array("Q"), array("i")
        starts = [0] if starts is None else starts
        for number, record in enumerate(records):
            blob += marshal.dumps(record)
            ends.append(len(blob))
            keys.append(picture_key(record, number, roots[len(starts) - 1]))
            caption = record.get("caption")
            counts.append(len(caption) if isinstance(caption, list) else int(caption is not None))
        self._blob = np.frombuffer(blob, np.uint8)
        self._ends = np.frombuffer(ends, np.int64)
        self.num_captions = np.frombuffer(counts, np.int32)
        self.pictures, self.num_pictures = number_pictures(np.frombuffer(keys, np.uint64))
        self._roots, self._files = list(roots), list(files)
        self.columns = tuple(columns)
        self._starts = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no record {index} of {len(self)}")
        index %= len(self)
        # These are bytes of our own making, never those of a file.
        return marshal.loads(self._blob[self._ends[index] : self._ends[index + 1]].tobytes())

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of memory, all of it NumPy's."""
        arrays = (self._blob, self._ends, self.num_captions, self.pictures)
        return sum(array.nbytes for array in arrays)

    def picture(self, index: int, entry: Any) -> str:
        """Path of a picture that record `index` names; an absolute one in the annotation stays as it is."""
        return os.path.join(self._roots[self._file(index)], str(entry))

    def where(self, index: int) -> str:
        """File and number within it of a record, for messages."""
        file = self._file(index)
        return f"{self._files[file]}[{index - int(self._starts[file])}]"

    def origin(self, index: int) -> tuple[str, str]:
        """The file of a record, and the folder that its picture's path starts from."""
        file = self._file(index)
        return self._files[file], self._roots[file]

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


class HfRecords:
    """Rows of a Hugging Face `datasets` folder, read from its memory-mapped Arrow files when needed.

    Args:
        dataset: a `datasets.Dataset`.
        columns: our name -> column.
        root: folder that image paths start from.
        file: name of the folder, for messages.
    """

    def __init__(self, dataset: Any, columns: Mapping[str, str], root: str, file: str) -> None:
        self._dataset, self._root, self._where = dataset, root, file
        renamed = {theirs: ours for ours, theirs in columns.items()}
        self._names = {name: renamed.get(name, name) for name in dataset.column_names}
        self.columns = tuple(columns)
        id_column = next(
            columns[name] for name in ("image_id", "image", "images", "video") if name in columns
        )
        light = dataset.select_columns([id_column]).with_format(None)
        keys = array("Q")
        for number, row in enumerate(light):
            value = row[id_column]
            # Embedded pictures without an id count as different ones; hashing them would read them all.
            plain = value not in (None, "") and not isinstance(value, dict | bytes | list)
            keys.append(hashed(f"picture {value}" if plain else f"record {number}"))
        self.pictures, self.num_pictures = number_pictures(np.frombuffer(keys, np.uint64))
        self.num_captions = np.ones(len(dataset), np.int32)
        if caption := columns.get("caption"):
            captions = dataset.select_columns([caption]).with_format(None)
            counts = (row[caption] for row in captions)
            self.num_captions = np.array([len(c) if isinstance(c, list) else 1 for c in counts], np.int32)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        row = self._dataset[int(index)]
        return {self._names[name]: value for name, value in row.items() if value is not None}

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def picture(self, index: int, entry: Any) -> str | bytes:
        """Content or path of a picture, from what a record has in its place."""
        if isinstance(entry, dict):
            if entry.get("bytes") is not None:
                return entry["bytes"]
            entry = entry["path"]
        return entry if isinstance(entry, bytes) else os.path.join(self._root, str(entry))

    def where(self, index: int) -> str:
        """Folder and row number, for messages."""
        return f"{self._where}[{index}]"

    def origin(self, index: int) -> tuple[str, str]:
        """The folder, and that which paths of pictures start from."""
        return self._where, self._root


class SomeRecords:
    """Some of other records, with their own numbers.

    Args:
        records: all of them.
        numbers: of those to keep, in order.
    """

    pictures: np.ndarray
    num_captions: np.ndarray
    columns: tuple[str, ...]

    def __init__(self, records: PackedRecords | HfRecords | SomeRecords, numbers: Sequence[int]) -> None:
        self._records, self._numbers = records, np.array(numbers, np.int64)
        self.pictures, self.num_pictures = number_pictures(records.pictures[self._numbers])
        self.num_captions = records.num_captions[self._numbers]
        self.columns = records.columns

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._records[int(self._numbers[index])]

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def picture(self, index: int, entry: Any) -> str | bytes:
        """Path or content of a picture that record `index` names."""
        return self._records.picture(int(self._numbers[index]), entry)

    def where(self, index: int) -> str:
        """File and number within it of a record, for messages."""
        return self._records.where(int(self._numbers[index]))

    def origin(self, index: int) -> tuple[str, str]:
        """The file of a record, and the folder that its picture's path starts from."""
        return self._records.origin(int(self._numbers[index]))


class ById:
    """Records by the value of one of their columns; in flat memory.

    Args:
        records: to look up; of several with the same value the first counts.
        column: its name.
    """

    def __init__(self, records: PackedRecords, column: str) -> None:
        self._records = records
        keys = np.array([hashed(f"{record.get(column)}") for record in records], np.uint64)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def get(self, value: Any) -> Record | None:
        """The record whose column has this value, as text; None: there is none."""
        key = np.uint64(hashed(f"{value}"))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        return self._records[int(self._order[place])]


def within_split(
    records: PackedRecords | HfRecords | SomeRecords,
    split: str,
    name: str,
    limit: int | None = None,
    column: str = "split",
) -> SomeRecords:
    """The records of one split of a file that holds several, by a column of it; see `of_types`."""
    numbers = [number for number, record in enumerate(records) if str(record.get(column)) == split]
    if not numbers:
        raise DataError(
            f"datasets.{name}: no record has {column} {split!r}; take the file as it was published"
        )
    return SomeRecords(records, numbers[:limit])


def of_types(
    records: PackedRecords | HfRecords | SomeRecords,
    types: Sequence[str],
    name: str,
    limit: int | None = None,
) -> SomeRecords:
    """The records of some types, by their column `type`.

    Args:
        records: all of them.
        types: to keep.
        name: of the dataset, for messages.
        limit: number of records to keep; None: all.

    Raises:
        DataError: no record is of one of the types.
    """
    numbers: list[int] = []
    found: dict[str, None] = {}
    for number, record in enumerate(records):
        found[own := str(record.get("type", ""))] = None
        if own in types:
            numbers.append(number)
    if missing := [one for one in types if one not in found]:
        known = [own for own in found if own]
        text = hint(missing[0], known) if known else "; its records have no column 'type'"
        raise DataError(f"datasets.{name}.types: no record is of type {missing[0]!r}{text}")
    return SomeRecords(records, numbers[:limit])


def read_records(
    paths: Sequence[Path],
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    roots: Sequence[Path | None] | None = None,
    name: str = "data",
    limit: int | None = None,
    required: Required = (("image", "video"), ("caption",)),
    suffix: str = "",
) -> PackedRecords | HfRecords:
    """Records of annotation files, one after the other.

    Args:
        paths: files, image folders, or one Hugging Face folder.
        layout: json, jsonl, csv, tsv, folder, hf; `auto` tells by name and content.
        columns: our name -> the file's name, where they differ; unknown columns are kept.
        roots: for each path the folder its image paths start from; None: the folder of the file.
        name: of the dataset, for messages.
        limit: number of records to read; None: all.
        required: columns without which the data is useless.
        suffix: added to names of pictures that have none, such as `.jpg`.

    Raises:
        DataError: no records, a missing column, a file that cannot be read; the message says what to do.
    """
    columns = dict(columns or {})
    _check_columns(columns, name)
    places = [_root(path, root) for path, root in zip(paths, roots or [None] * len(paths), strict=True)]
    layouts = [detect(path) if layout == "auto" else layout for path in paths]
    if "shards" in layouts:
        raise DataError(
            f"datasets.{name}.path: {paths[layouts.index('shards')]} holds shards; give them alone"
        )
    if "hf" in layouts:
        if len(paths) > 1:
            raise DataError(f"datasets.{name}.path: give one Hugging Face folder, not {len(paths)} paths")
        return _read_hf(paths[0], columns, places[0], name, limit, required)
    starts: list[int] = []
    found: list[str] = []
    stream = _stream(paths, layouts, columns, name, required, suffix, starts, found)
    files = [str(path) for path in paths]
    packed = PackedRecords(itertools.islice(stream, limit), places, starts, files, found)
    if not len(packed):
        raise DataError(f"datasets.{name}.path: {', '.join(files)} holds no records; {instead(paths[0])}")
    return packed


def _stream(
    paths: Sequence[Path],
    layouts: Sequence[str],
    columns: Mapping[str, str],
    name: str,
    required: Required,
    suffix: str,
    starts: list[int],
    found: list[str],
) -> Iterator[Record]:
    """All records with our column names; notes in `starts` where each file begins, in `found` its columns."""
    count = 0
    for path, layout in zip(paths, layouts, strict=True):
        starts.append(count)
        try:
            records = read_file(path, layout)
            head = list(itertools.islice(records, _LOOKED_AT))
            names = _find_columns(head, columns, path, name, required)
            found += [ours for ours in names if ours not in found]
            names = {ours: theirs for ours, theirs in names.items() if ours != theirs}
            for record in itertools.chain(head, records):
                count += 1
                record = _rename(record, names)
                if suffix and "image" in record and not str(record["image"]).lower().endswith(IMAGE_SUFFIXES):
                    record = {**record, "image": f"{record['image']}{suffix}"}
                yield record
        except OSError as error:
            raise DataError(f"datasets.{name}.path: {path} cannot be read ({error.strerror})") from error
        except DataError as error:
            raise DataError(f"datasets.{name}.path: {error}") from error


def _find_columns(
    head: Sequence[Record], columns: Mapping[str, str], path: Path, name: str, required: Required
) -> dict[str, str]:
    """Our name -> the file's name, from what `columns` says and the first records have."""
    good = [record for record in head if MALFORMED not in record]
    if head and not good:
        raise DataError(
            f"{path}: no usable record among the first {len(head)}; the first: {head[0][MALFORMED]}"
        )
    present = list(dict.fromkeys(key for record in good for key in record))
    names = {}
    for ours, known in COLUMNS.items():
        theirs = columns.get(ours)
        if theirs is not None and present and theirs not in present:
            raise DataError(
                f"{path} has no column {theirs!r}, which datasets.{name}.columns.{ours} names; it has"
                f" {', '.join(present)}{_meant(theirs, present)}"
            )
        found = theirs or next((alias for alias in known if alias in present), None)
        if found is not None:
            names[ours] = found
    # A file that names its videos may have columns that pictures are looked for under, such as `path`.
    if "video" in names and "image" not in columns and names.get("image", "image") != "image":
        del names["image"]
    for some in required(list(names)) if callable(required) else required:
        if present and not any(ours in names for ours in some):
            if some[0] == "caption" and present == ["image"] and detect(path) == "folder":
                raise DataError(f"{path} has {NO_CAPTIONS}")
            raise DataError(
                f"{path} has no column {some[0]!r}, only {', '.join(present)}; name the one that holds it:"
                f" datasets.{name}.columns: {{{some[0]}: ...}}{_meant(some[0], present)}"
            )
    return names


def _rename(record: Record, names: Mapping[str, str]) -> Record:
    if not names or MALFORMED in record:
        return record
    taken = set(names.values())
    renamed = {key: value for key, value in record.items() if key not in taken and key not in names}
    return renamed | {ours: record[theirs] for ours, theirs in names.items() if theirs in record}


def _read_hf(
    path: Path, columns: Mapping[str, str], root: str, name: str, limit: int | None, required: Required
) -> HfRecords:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"datasets.{name}.path: {path} is a Hugging Face folder, which needs the package 'datasets'; run"
            " 'pip install datasets', or export the data to JSONL"
        ) from error
    if (path / "dataset_dict.json").is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / "dataset_info.json").is_file())
        raise DataError(
            f"datasets.{name}.path: {path} has the splits {', '.join(splits)}; give one folder per split, as"
            f" in path: {{train: {path / splits[0] if splits else path}}}"
        )
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"datasets.{name}.path: {path} cannot be read ({error})") from error
    if not len(dataset):
        raise DataError(f"datasets.{name}.path: {path} holds no records; give a file that has some")
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(range(limit))
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(column, type(feature)(datasets.Image(decode=False)))
    try:
        names = _find_columns([dict.fromkeys(dataset.column_names)], columns, path, name, required)
    except DataError as error:
        raise DataError(f"datasets.{name}.path: {error}") from error
    return HfRecords(dataset, names, root, str(path))


def _root(path: Path, root: Path | None) -> str:
    if root is not None:
        return str(root)
    return str(path if path.is_dir() else path.parent)


def _check_columns(columns: Mapping[str, str], name: str) -> None:
    for ours in columns:
        if ours not in COLUMNS:
            raise DataError(
                f"datasets.{name}.columns.{ours}: no column of ours; left is our name, right the file's"
                f"{hint(ours, COLUMNS)}"
            )


def _meant(name: str, present: Sequence[str]) -> str:
    text = hint(name, present)
    return text if "did you mean" in text else ""
