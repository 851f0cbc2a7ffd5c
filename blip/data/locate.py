"""A dataset section -> the files of its splits: what `datasets.NAME` of a configuration points at."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip.config.schema import DatasetConfig
from blip.data.catalog import table as catalog
from blip.data.catalog.scoring import scoring
from blip.data.catalog.table import CATALOG, Row
from blip.data.readers import detect
from blip.data.streams.fetch import is_remote
from blip.data.streams.stores import LocalShards, RemoteShards, Store, find_urls
from blip.data.streams.tars import find_shards
from blip.errors import ConfigError, DataError, hint

log = logging.getLogger(__name__)

_FILES = ("json", "jsonl", "csv", "tsv")
_SPLITS = {"train": ("train",), "val": ("val", "validation", "dev"), "test": ("test",)}


@dataclass
class Source:
    """Where one split of a dataset lies: existing files of one layout."""

    paths: list[Path]
    layout: str
    roots: list[Path | None]
    """For each path the folder that its image or video paths start from; None: the folder of the file."""
    columns: dict[str, str]
    named: list[str]
    """The catalogue's name where its files were looked for, else empty."""
    kind: str = "auto"
    """What the records are, a key of `kinds.KINDS`; `auto`: their columns tell."""
    captioned: bool = True
    """Whether captions are to be expected."""
    suffix: str = ""
    """Added to names of pictures that have none."""
    classes: tuple[str, ...] = ()
    """Labels in the order of their numbers, where the section or the catalogue names them."""
    answer_list: Path | None = None
    """File of the answers that are ranked."""
    official: Path | None = None
    """Official annotations of the split."""
    judged: Path | None = None
    """What is in the pictures of the embedded scenes."""
    types: list[str] = field(default_factory=list)
    """Types of the records to read; empty: all."""
    within: str = ""
    """What the records of the split have in a column of a file of several; empty: all are its."""
    within_column: str = "split"
    """That column."""
    templates: str = ""
    """List of instructions where the section names none; empty: that of the kind."""
    measure: str = ""
    """What counts as right; empty: nothing is said about it."""
    server: str = ""
    """Format of what the evaluation server takes; empty: the usual one."""
    relevance: Path | None = None
    """File of how relevant each candidate is; it may be missing."""
    shards: Store = field(default_factory=lambda: LocalShards([]))
    """Of layout `shards`: where they lie; `paths` are empty where that is no disk."""
    ocr: Path | None = None
    """File of words read in the pictures; it may be missing where no template shows them."""


class MissingData(DataError):
    """Files of datasets are not on disk.

    Args:
        problem: which ones.
        names: of the datasets; the catalogue knows how to get some.
        advice: what to do about others.
    """

    def __init__(self, problem: str, names: Iterable[str], advice: str = "") -> None:
        self.problem, self.names, self.advice = problem, list(names), advice
        super().__init__("; ".join(text for text in (problem, catalog.remedy(self.names), advice) if text))


def available_splits(name: str, config: DatasetConfig, data_root: str | Path | None = None) -> list[str]:
    """The splits that a section has, whether or not its files are there."""
    return list(_splits(name, config, catalog.data_root(data_root)))


def require_files(
    wanted: Iterable[tuple[str, DatasetConfig, str]], data_root: str | Path | None = None
) -> None:
    """Raise one error that names everything missing, before anything is built.

    Args:
        wanted: (name, section, split) of each dataset that a run needs.
        data_root: as `run.data_root`.

    Raises:
        MissingData: files of one or several datasets are missing.
    """
    missing = []
    for name, config, split in wanted:
        try:
            locate(name, config, split, data_root)
        except MissingData as error:
            missing.append(error)
    if missing:
        problems = "; ".join(dict.fromkeys(error.problem for error in missing))
        advice = "; ".join(dict.fromkeys(error.advice for error in missing if error.advice))
        raise MissingData(problems, [name for error in missing for name in error.names], advice)


def locate(name: str, config: DatasetConfig, split: str, data_root: str | Path | None = None) -> Source:
    """The files of one split.

    Raises:
        MissingData: they are not there.
        DataError: the dataset is unknown, or has no such split.
    """
    root = catalog.data_root(data_root)
    splits = _splits(name, config, root)
    if split not in splits:
        raise DataError(
            f"datasets.{name}: no split {split!r}, only {', '.join(splits) or 'none'}; name its files, as in"
            f" datasets.{name}.path: {{{split}: ...}}"
        )
    texts = _listed(splits[split])
    named = [name] if config.path is None else []
    row = CATALOG.get(name) if named else None
    columns = {**(row.columns if row else {}), **config.columns}
    layout = config.format if config.format != "auto" else (row.format if row else "auto")
    if any(is_remote(text) for text in texts):
        source = _in_shards(name, config, [], columns, named)
        source.shards = _remote_shards(name, config, texts, root)
        return source
    if layout == "shards" or any(text.endswith(".tar") for text in texts):
        return _in_shards(name, config, _shards(name, texts, root, named), columns, named)
    paths = [_existing(name, text, root, named) for text in texts]
    if layout == "auto" and all(_detected(name, path) == "shards" for path in paths):
        return _in_shards(name, config, _shards(name, texts, root, named), columns, named)
    if config.num_samples is not None:
        raise ConfigError(f"datasets.{name}.num_samples: only shards need to be told; leave it out")
    source = Source(paths, layout, _roots(name, config, split, paths, root), columns, named)
    source.types = list(config.types)
    scored = scoring(name)
    source.measure = scored.measure if config.measure == "auto" else config.measure
    source.server = scored.server
    source.relevance = root / scored.relevance[split] if split in scored.relevance else None
    kind = row.kind if row else "auto"
    source.kind = config.kind if config.kind != "auto" else "caption" if kind == "retrieval" else kind
    source.classes = tuple(config.classes)
    if row is not None:
        source.captioned, source.suffix = split not in row.uncaptioned, row.suffix
        source.classes = source.classes or row.classes
        source.judged = root / row.judged[split] if split in row.judged else None
        source.templates = row.templates
        source.within, source.within_column = row.within.get(split, ""), row.within_column
    _add_evaluation_files(source, name, config, split, root, row)
    _add_words_read(source, name, config, split, root, row)
    return source


def _in_shards(
    name: str, config: DatasetConfig, paths: list[Path], columns: dict[str, str], named: list[str]
) -> Source:
    if config.types:
        raise ConfigError(f"datasets.{name}.types: shards have no types; leave it out")
    if config.kind not in ("auto", "caption"):
        raise ConfigError(
            f"datasets.{name}.kind: shards hold pictures with captions; {config.kind} data is read from"
            " annotation files, such as JSON"
        )
    source = Source(paths, "shards", [], columns, named, kind="caption")
    source.shards = LocalShards(paths, config.num_samples)
    return source


def _remote_shards(name: str, config: DatasetConfig, texts: list[str], root: Path) -> RemoteShards:
    urls = find_urls(name, texts, config.remote)
    folder = root / "remote" if config.cache_dir is None else Path(config.cache_dir).expanduser()
    return RemoteShards(name, urls, folder, round(config.cache_gb * 1e9), config.num_samples)


def _add_evaluation_files(
    source: Source, name: str, config: DatasetConfig, split: str, root: Path, row: Row | None
) -> None:
    """What the section, LAVIS's `build_info` or the catalogue name for evaluation, best first."""
    storage = _mapping(_mapping(config.build_info.get("annotations")).get(split)).get("storage")
    # LAVIS: records, answer list, official questions, official annotations.
    beside = _listed(storage) if isinstance(storage, list | tuple) and split != "train" else []
    beside += [""] * (4 - len(beside))
    official = config.annotation_file
    if isinstance(official, Mapping):
        official = official.get(split)
    if config.answer_list:
        source.answer_list = _existing(name, config.answer_list, root, [], "answer_list")
    elif beside[1] and _place(beside[1], root).is_file():
        source.answer_list = _place(beside[1], root)
    elif row is not None and row.answer_list:
        source.answer_list = root / row.answer_list
    if official:
        source.official = _existing(name, str(official), root, [], "annotation_file")
    elif official is None and beside[3] and _place(beside[3], root).is_file():
        source.official = _place(beside[3], root)
    elif official is None and row is not None and split in row.official:
        source.official = _existing(name, row.official[split], root, source.named, "annotation_file")


def _add_words_read(
    source: Source, name: str, config: DatasetConfig, split: str, root: Path, row: Row | None
) -> None:
    """The file of `ocr_tokens` that the section or the catalogue names."""
    given = config.ocr_file
    if isinstance(given, Mapping):
        given = given.get(split)
    if given:
        source.ocr = _existing(name, str(given), root, [], "ocr_file")
    elif given is None and row is not None and split in row.ocr:
        source.ocr = root / row.ocr[split]


def _detected(name: str, path: Path) -> str:
    try:
        return detect(path)
    except DataError as error:
        raise DataError(f"datasets.{name}.path: {error}") from error


def _splits(name: str, config: DatasetConfig, root: Path) -> dict[str, Any]:
    """Split -> what its path says: one text or a list of them."""
    if isinstance(config.path, Mapping):
        found: dict[str, Any] = {split: value for split, value in config.path.items() if value is not None}
    elif isinstance(config.path, str):
        inside = _inside(_place(config.path, root), config.format)
        found = inside or {config.split or "train": config.path}
    elif config.path is not None:
        found = {config.split or "train": config.path}
    else:
        found = _build_info(name, config, root)
        if not found and name in CATALOG:
            found = _of_catalogue(CATALOG[name], root)
    if not found:
        raise DataError(
            f"datasets.{name}: not in the catalogue and without a path; give datasets.{name}.path, or a name"
            f" that 'blip data list' shows{catalog.similar(name)}"
        )
    if config.split is None:
        return found
    return {split: value for split, value in found.items() if split == config.split}


def _of_catalogue(row: Row, root: Path) -> dict[str, Any]:
    """The files of a row, or the shards that its pictures were downloaded into."""
    listed = any((root / text).is_file() for text in row.files)
    if row.downloaded and not listed and any(root.glob(row.downloaded)):
        return dict.fromkeys(row.splits, row.downloaded)
    return dict(row.splits)


def _inside(folder: Path, layout: str) -> dict[str, str]:
    """The splits that a folder holds by the names of its files or subfolders; empty when it is one itself."""
    endings = (
        [f".{layout}"] if layout in _FILES else [f".{kind}" for kind in _FILES] if layout == "auto" else []
    )
    found = {}
    for split, names in _SPLITS.items():
        files = [folder / sub / f"{n}{end}" for sub in ("", "annotations") for n in names for end in endings]
        places = [path for path in files if path.is_file()]
        places += [folder / n for n in names if (folder / n).is_dir()] if layout not in _FILES else []
        if places:
            found[split] = str(places[0].absolute())
    return found


def _build_info(name: str, config: DatasetConfig, root: Path) -> dict[str, Any]:
    """LAVIS's `build_info`: annotations per split, or one storage pattern of shards."""
    found = {}
    for split, entry in _mapping(config.build_info.get("annotations")).items():
        storage = entry.get("storage") if isinstance(entry, Mapping) else entry
        if storage is not None:
            # LAVIS lists answer lists and official question files behind the records of evaluation splits.
            found[split] = storage if split == "train" else _listed(storage)[0]
    storage = config.build_info.get("storage")
    found = found or ({"train": storage} if storage is not None else {})
    if name in CATALOG and _foreign([text for value in found.values() for text in _listed(value)]):
        log.warning("datasets.%s.build_info: its files are not on this machine; using the catalogue's", name)
        return {}
    return found


def _roots(name: str, config: DatasetConfig, split: str, paths: list[Path], root: Path) -> list[Path | None]:
    """For each annotation file the folder that its image paths start from."""
    images: Any = config.images
    row = CATALOG.get(name)
    if isinstance(images, Mapping):
        images = images.get(split)
    if images is None:
        images = _mapping(config.build_info.get("images") or config.build_info.get("videos")).get("storage")
        if images is not None and row and _foreign(_listed(images)):
            log.warning("datasets.%s.build_info: %s is not here; using the catalogue's", name, images)
            images = row.images or None
    if images is None and row and config.path is None:
        images = row.images
    if images is None:
        # A folder that keeps its lists in `annotations` keeps its pictures beside that.
        return [p.parent.parent if p.is_file() and p.parent.name == "annotations" else None for p in paths]
    places = [_place(text, root) for text in _listed(images)]
    for text, place in zip(_listed(images), places, strict=True):
        if not place.is_dir():
            problem = f"datasets.{name}.images: no folder {text!r}{_under(text, root)}"
            advice = "give the folder that the records' image paths start from"
            named = [name] if config.images is None else []
            raise MissingData(problem, named, "" if named else advice)
    if len(places) not in (1, len(paths)):
        raise ConfigError(
            f"datasets.{name}.images: {len(places)} folders for {len(paths)} annotation files; give one, or"
            " one each"
        )
    return [*places] if len(places) == len(paths) else places * len(paths)  # type: ignore[return-value]


def _existing(name: str, text: str, root: Path, named: list[str], key: str = "path") -> Path:
    place = _place(text, root)
    if not place.exists():
        beside = sorted(p.name for p in place.parent.iterdir()) if place.parent.is_dir() else []
        problem = f"datasets.{name}.{key}: no file {text!r}{_under(text, root)}"
        advice = (
            f"correct datasets.{name}.{key} or run.data_root, or put the file there{hint(place.name, beside)}"
        )
        raise MissingData(problem, named, "" if named else advice)
    return place


def _shards(name: str, texts: list[str], root: Path, named: list[str]) -> list[Path]:
    paths = []
    for text in texts:
        try:
            paths += find_shards(os.path.expanduser(text), root)
        except DataError as error:
            try:
                paths += find_shards(text)
            except DataError:
                raise MissingData(f"datasets.{name}.path: {error}", named) from error
        except ConfigError as error:
            raise ConfigError(f"datasets.{name}.path: {error}") from error
    return paths


def _place(text: str, root: Path) -> Path:
    """Below the data root; or, if it only exists there, below the working directory."""
    path = Path(text).expanduser()
    return path if not (root / path).exists() and path.exists() else root / path


def _under(text: str, root: Path) -> str:
    return "" if Path(text).is_absolute() else f" under {str(root)!r}"


def _foreign(texts: list[str]) -> bool:
    """Whether these are absolute paths of another machine: LAVIS's files name its authors' disks."""
    return bool(texts) and all(Path(text).is_absolute() and not Path(text).exists() for text in texts)


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
