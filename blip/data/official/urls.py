"""Lists of addresses of pictures in the formats that img2dataset takes: an address and a caption a row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip.data.readers import Record, detect, open_text, read_file, read_table
from blip.data.samples import MALFORMED
from blip.errors import DataError, hint

URL_COLUMNS = ("url", "URL", "image_url", "image_urls", "image_link", "photo_url", "Image_URL")
CAPTION_COLUMNS = ("caption", "TEXT", "text", "captions", "caption_str", "title", "description")
"""Names that the columns are looked for under, best first."""
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")


def read_urls(
    paths: Sequence[Path], url: str = "", caption: str = "", columns: Sequence[str] = ()
) -> Iterator[Record]:
    """Records with `url` and `caption`, and the other columns; damaged ones as other readers give them.

    Args:
        paths: files, or folders of them, one after the other; or two text files of as many lines, addresses
            and captions. All but parquet may end with `.gz`.
        url: column of the addresses; empty: told by its name.
        caption: column of the captions; empty: told by its name, if there is one.
        columns: names of the columns of tables without a header.

    Raises:
        DataError: a file cannot be used.
    """
    files = [file for path in paths for file in _files(path)]
    if len(files) == 2 and all(file.name.removesuffix(".gz").endswith(".txt") for file in files):
        captions = [line["url"] for line in _lines(files[1])]
        addresses = [line["url"] for line in _lines(files[0])]
        if len(captions) != len(addresses):
            raise DataError(
                f"{files[0]} has {len(addresses)} lines and {files[1]} {len(captions)}; give the two files of"
                " one set, addresses first"
            )
        yield from ({"url": a, "caption": c} for a, c in zip(addresses, captions, strict=True))
        return
    for file in files:
        names: dict[str, str] | None = None
        for record in _rows(file, columns):
            if MALFORMED in record:
                yield record
                continue
            names = names or _names(file, record, url, caption)
            rest = {key: value for key, value in record.items() if key not in names.values()}
            yield {**rest, **{ours: record.get(theirs) for ours, theirs in names.items()}}


def is_list(path: Path, url: str = "", columns: Sequence[str] = ()) -> bool:
    """Whether the first good record of a file names an address and no picture on disk."""
    if path.name.removesuffix(".gz").endswith((".txt", ".parquet")):
        return True
    for record in _rows(_files(path)[0], columns):
        if MALFORMED not in record:
            known = any(name in record for name in ((url,) if url else URL_COLUMNS))
            return known and "image" not in record and "file_name" not in record
    return False


def _files(path: Path) -> list[Path]:
    found = [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.removesuffix(".gz").endswith(ENDINGS))
    if not found or not found[0].is_file():
        raise DataError(f"{path}: no list of addresses there ({', '.join(ENDINGS)}, or a folder of such)")
    return found


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    plain = path.name.removesuffix(".gz")
    try:
        if plain.endswith(".parquet"):
            yield from _parquet(path)
        elif plain.endswith(".txt"):
            yield from _lines(path)
        elif plain.endswith((".csv", ".tsv")):
            yield from read_table(path, "\t" if plain.endswith(".tsv") else ",", columns)
        elif plain.endswith((".jsonl", ".ndjson")):
            yield from read_file(path, "jsonl")
        elif plain.endswith(".json"):
            yield from _json(path)
        else:
            raise DataError(f"{path}: no known kind of list; give one of {', '.join(ENDINGS)}")
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is the download complete?") from error


def _json(path: Path) -> Iterator[Record]:
    """A list of objects; or, as SBU has it, an object of lists, one per column."""
    layout = "json" if path.suffix == ".gz" else detect(path)
    columnar = _columnar(path) if layout == "json" else None
    if columnar is None:
        yield from read_file(path, layout)
        return
    for row in zip(*columnar.values(), strict=True):
        yield dict(zip(columnar, row, strict=True))


def _columnar(path: Path) -> dict[str, list[Any]] | None:
    with open_text(path) as file:
        if file.read(256).lstrip()[:1] != "{":
            return None
        file.seek(0)
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); is the download complete?") from error
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    sizes = {len(value) for value in lists.values()}
    return lists if len(sizes) == 1 and any(name in lists for name in URL_COLUMNS) else None


def _lines(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        for line in file:
            if text := line.strip():
                yield {"url": text}


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{path}: a parquet file, which needs the package 'pyarrow'; run 'pip install pyarrow', or give"
            " the list as jsonl, csv or tsv"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}); is the download complete?") from error


def _names(path: Path, record: Record, url: str, caption: str) -> dict[str, str]:
    """Our names of the two columns -> the file's."""
    present = list(record)
    names = {}
    for ours, given, known in (("url", url, URL_COLUMNS), ("caption", caption, CAPTION_COLUMNS)):
        found = given or next((name for name in known if name in record), "")
        if given and given not in record:
            raise DataError(f"{path}: no column {given!r} (--{ours}-column){hint(given, present)}")
        if found:
            names[ours] = found
    if "url" not in names:
        raise DataError(
            f"{path}: no column of addresses, only {', '.join(present)}; name it by --url-column, or the"
            " columns of a table without a header by --columns url,caption"
        )
    return names
