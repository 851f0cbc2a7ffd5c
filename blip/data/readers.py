"""JSON, JSONL, CSV, TSV and image folders as streams of records; large files are never held whole as objects.

A reader yields one dictionary per record. What one record spoils costs that record only: it comes as
`{MALFORMED: reason}` and is counted later. What spoils the file raises a DataError.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from blip.data.samples import MALFORMED
from blip.data.video import IMAGE_SUFFIXES
from blip.errors import DataError

Record = dict[str, Any]

METADATA = ("metadata.jsonl", "metadata.csv")
"""Beside the pictures of a folder: `file_name` and captions, as Hugging Face's `imagefolder` has them."""

NO_CAPTIONS = (
    "pictures without captions; put a NAME.txt beside each NAME.jpg, or one metadata.csv with the columns"
    " file_name and text"
)
"""What is wrong with a folder, and what to do."""

_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_TEXTS = ("sentence", "caption", "question")
"""Columns that tell that an object is a record itself."""


def _every_record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of records that have the same key none is lost, as of samples in shards."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    found = {}
    for key, value in pairs:
        while isinstance(value, dict) and key in found:
            key += "'"
        found[key] = value
    return found


_PLAIN = json.JSONDecoder()
_EVERY_RECORD = json.JSONDecoder(object_pairs_hook=_every_record)


def read_file(path: Path, layout: str) -> Iterator[Record]:
    """The records of one annotation file or image folder.

    Args:
        path: to read.
        layout: json, jsonl, csv, tsv or folder.

    Raises:
        DataError: the file as a whole cannot be used; the message names it, and line or record.
    """
    if layout == "folder":
        return read_folder(path)
    if layout == "json":
        return read_json(path)
    return read_jsonl(path) if layout == "jsonl" else read_table(path, "\t" if layout == "tsv" else ",")


def detect(path: Path) -> str:
    """The layout of a file or folder, by its name and first character.

    Raises:
        DataError: it tells neither.
    """
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return "hf"
        return "shards" if any(path.glob("*.tar")) else "folder"
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "shards"
    if suffix == ".json":
        return "jsonl" if _is_jsonl(path) else "json"
    if suffix in (".jsonl", ".csv", ".tsv"):
        return suffix[1:]
    if suffix == ".ndjson":
        return "jsonl"
    raise DataError(
        f"{path}: no known kind of annotation file; set the dataset's format to json, jsonl, csv, tsv,"
        " folder, shards or hf"
    )


def _is_jsonl(path: Path) -> bool:
    """Whether a file is one object per line although it is called `.json`."""
    with open_text(path) as file:
        lines = [line.strip() for line in (file.readline(_CHUNK), file.readline(_CHUNK))]
    return all(line.startswith("{") and line.endswith("}") for line in lines)


def open_text(path: Path) -> TextIO:
    """A text file, or one that `gzip` has packed, whatever bytes it holds.

    Raises:
        DataError: it is UTF-16, as spreadsheets save "Unicode text".
    """
    # A byte that is not UTF-8 spoils its own caption (which becomes bad_text), not the whole file.
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    if path.suffix == ".gz":
        return gzip.open(path, "rt", **how)
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path}: its text is UTF-16; save it as UTF-8")
    return path.open(**how)


def read_json(path: Path) -> Iterator[Record]:
    """Records of a JSON file: a list, COCO captions, a list under `data`, or an object of records by id.

    A dialog of VisDial gives one record per turn, and a record with `questions` and as many `answers`, as
    OCR-VQA has them, one per question.
    """
    with open_text(path) as file:
        stream = _JsonStream(file, path)
        if stream.peek() == "[":
            for item in stream.items():
                yield from _each(item)
            return
        if stream.peek() != "{":
            start = f"it starts with {stream.peek()!r}" if stream.peek() else "the file is empty"
            raise DataError(
                f"{path}: neither a JSON list nor an object; {start}; give a list of records, each with an"
                " image and a caption"
            )
        content = stream.value(_EVERY_RECORD)
    yield from _records_of(content, path)


def _records_of(content: dict[str, Any], path: Path) -> Iterator[Record]:
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        yield from _coco(content["images"], content["annotations"], path)
        return
    if isinstance(content.get("data"), dict) and isinstance(content["data"].get("dialogs"), list):
        yield from _visdial(content["data"], str(content.get("split", "")), path)
        return
    items: Any = content
    # The official VQA files, and those that hold their records under `data`.
    listed = [key for key in ("data", "annotations", "questions") if isinstance(content.get(key), list)]
    if listed:
        items = content[listed[0]]
    elif content and all(isinstance(item, dict) for item in content.values()):
        items = [{"sample_id": key, **item} for key, item in content.items()]
    elif any(isinstance(content.get(key), str) for key in _TEXTS):
        items = [content]  # a file of one line, which does not look like JSONL
    if not isinstance(items, list):
        keys = ", ".join(list(content)[:6]) or "nothing"
        raise DataError(
            f"{path}: an object with {keys}; expected a list of records, 'images' and 'annotations' as in"
            " COCO, 'data' with a list, or one record per key"
        )
    for item in items:
        yield from _each(item)


def _each(item: Any) -> Iterator[Record]:
    """What an item of a list stands for: itself, or a record for each of its questions."""
    if not isinstance(item, dict):
        yield {MALFORMED: f"{_kind(item)}, not an object"}
        return
    questions, answers = item.get("questions"), item.get("answers")
    if not (isinstance(questions, list) and isinstance(answers, list) and len(questions) == len(answers)):
        yield item
        return
    rest = {key: value for key, value in item.items() if key not in ("questions", "answers")}
    for question, answer in zip(questions, answers, strict=True):
        yield {**rest, "question": question, "answer": answer}


def _visdial(data: dict[str, Any], split: str, path: Path) -> Iterator[Record]:
    """A record per turn: `question`, `answer`, `choices`, `correct_choice`, `caption`, and the `history`."""
    questions: Any = data.get("questions")
    answers: Any = data.get("answers")
    try:
        for dialog in data["dialogs"]:
            image = f"VisualDialog_{split}/VisualDialog_{split}_{int(dialog['image_id']):012d}.jpg"
            turns: list[str] = []
            # Of the test split's dialogs only the last turn is asked; the others are its history.
            asked = any("answer_options" in turn for turn in dialog["dialog"])
            for number, turn in enumerate(dialog["dialog"]):
                question = questions[turn["question"]]
                known = {"answer": answers[turn["answer"]]} if "answer" in turn else {}
                options = [answers[option] for option in turn.get("answer_options", ())]
                if not asked or options:
                    yield {
                        "image": image,
                        "image_id": dialog["image_id"],
                        "question_id": f"{dialog['image_id']}#{number}",
                        "question": question,
                        "history": " ".join(turns),
                        **known,
                        **({"caption": dialog["caption"]} if "caption" in dialog else {}),
                        **({"choices": options} if options else {}),
                        **({"correct_choice": turn["gt_index"]} if "gt_index" in turn else {}),
                    }
                turns.append(f"q: {question} a: {known.get('answer', '')}".rstrip())
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: has 'dialogs' that cannot be read ({type(error).__name__}: {error}); give VisDial's own"
            " file, whose turns number the lists 'questions' and 'answers'"
        ) from error


def _coco(images: list[Any], annotations: list[Any], path: Path) -> Iterator[Record]:
    """One record per picture, with the list of its captions."""
    captions: dict[Any, list[Any]] = {}
    try:
        for annotation in annotations:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in images:
            own = captions.pop(image["id"], [])
            record = {"image": image.get("file_name"), "image_id": image["id"], "caption": own}
            record["domain"] = image.get("domain")  # NoCaps's
            yield {key: value for key, value in record.items() if value is not None}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: has 'images' and 'annotations' but no COCO captions ({type(error).__name__}: {error});"
            " images need id and file_name, annotations need image_id and caption"
        ) from error
    for image_id, own in captions.items():
        yield {MALFORMED: f"{len(own)} caption(s) of image {image_id!r}, which is not among the images"}


class _JsonStream:
    """Values of a JSON text, one after the other, with a few megabytes of it in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._buffer, self._at, self._line = "", 0, 1
        self._more = True
        self._count: int | None = None

    def peek(self) -> str:
        """The next character that is not space; empty at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._buffer) or not self._refill():
                return self._buffer[self._at : self._at + 1]

    def value(self, decoder: json.JSONDecoder = _PLAIN) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, ValueError) and self._refill():
                    continue
                raise self._error(error) from error
            # A number at the very end of the buffer may go on.
            if end == len(self._buffer) and self._refill():
                continue
            self._at = end
            return value

    def items(self) -> Iterator[Any]:
        """The items of the list that starts here."""
        self._at += 1
        self._count = 0
        if self.peek() == "]":
            return
        while True:
            yield self.value()
            self._count += 1
            follows = self.peek()
            self._at += 1
            if follows == "]":
                return
            if follows != ",":
                found = f"{follows!r} where a comma or ] should be" if follows else "the file ends"
                raise self._error(ValueError(f"{found} after record {self._count - 1}"))

    def _refill(self) -> bool:
        """Read on, dropping what is done; False at the end of the file."""
        if not self._more:
            return False
        self._line += self._buffer.count("\n", 0, self._at)
        rest = self._buffer[self._at :]
        # Twice as much each time, so that one huge value is not parsed again for every megabyte of it.
        fresh = self._file.read(max(_CHUNK, len(rest)))
        self._more = bool(fresh)
        self._buffer, self._at = rest + fresh, 0
        return self._more

    def _error(self, error: Exception) -> DataError:
        line = self._line
        reason = str(error) or type(error).__name__
        if isinstance(error, json.JSONDecodeError):
            line += self._buffer.count("\n", 0, error.pos)
            reason = error.msg if self._count is None else f"{error.msg} in record {self._count}"
        else:
            line += self._buffer.count("\n", 0, self._at)
        return DataError(f"{self._path}, line {line}: not valid JSON ({reason}); is the file complete?")


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object per line; blank lines are skipped."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield {MALFORMED: f"line {number}: not valid JSON ({error})"}
                continue
            yield (
                item
                if isinstance(item, dict)
                else {MALFORMED: f"line {number}: {_kind(item)}, not an object"}
            )


def read_table(path: Path, delimiter: str, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Rows of a CSV or TSV file.

    Args:
        path: to read.
        delimiter: between two fields.
        columns: names of the fields; none: the first line has them.
    """
    csv.field_size_limit(_CHUNK)
    with open_text(path) as file:
        # Tab-separated web data has quotation marks that open and never close; only CSV is quoted.
        if delimiter == "\t":
            rows = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            rows = csv.reader(file, delimiter=delimiter)
        header: list[str] | None = list(columns) or None
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield {MALFORMED: f"line {rows.line_num}: {error}"}
                continue
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                _check_header(header, path, delimiter)
            elif len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            else:
                reason = f"{len(row)} fields where the header has {len(header)}"
                yield {MALFORMED: f"line {rows.line_num}: {reason}"}


def _check_header(header: Sequence[str], path: Path, delimiter: str) -> None:
    """Raise DataError where a table is one column because something else separates its fields."""
    other = next((sign for sign in "\t;|," if sign != delimiter and sign in header[0]), None)
    if len(header) == 1 and other is not None:
        advice = {"\t": "set the dataset's format to tsv", ",": "set the dataset's format to csv"}
        raise DataError(
            f"{path}: its first line is one field, {header[0][:80]!r}, which {other!r} seems to separate;"
            f" {advice.get(other, 'save it with commas, or as JSONL')}"
        )


def read_folder(path: Path) -> Iterator[Record]:
    """Pictures of a folder and its subfolders, linked ones too, in order of name, with their captions.

    Captions come from `metadata.csv` or `metadata.jsonl` in the folder (`file_name` and a caption column),
    else from a `.txt` of the same name beside each picture, one caption per line.
    """
    for name in METADATA:
        if (path / name).is_file():
            yield from read_file(path / name, name.rpartition(".")[2])
            return
    for folder, names in _walk(path):
        for name in sorted(names):
            if not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            image = Path(folder, name)
            record: Record = {"image": image.relative_to(path).as_posix()}
            text = image.with_suffix(".txt")
            if text.is_file():
                lines = text.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
                captions = [line.strip() for line in lines if line.strip()]
                record["caption"] = captions[0] if len(captions) == 1 else captions
            yield record


def instead(path: Path) -> str:
    """What to give in place of a file or folder without records."""
    if not path.is_dir():
        return "give a file that has some"
    if any(path.rglob("*.parquet")):
        return (
            "it has Parquet files: datasets.load_dataset(THIS, split='train').save_to_disk(FOLDER) makes a"
            " folder of them that is read"
        )
    return (
        "give a folder of pictures, of .tar shards, or one that save_to_disk of Hugging Face's datasets wrote"
    )


def _walk(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names in them; each folder once, also where links lead around in a circle."""
    seen = set()
    for folder, folders, names in os.walk(path, onerror=_raise, followlinks=True):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders.sort()
        yield folder, names


def _raise(error: OSError) -> None:
    raise error  # `os.walk` would pass over what a folder holds


def _kind(item: Any) -> str:
    return {"str": "a text", "list": "a list", "NoneType": "null"}.get(type(item).__name__, "a number")
