"""A dataset section -> files -> dataset: what `datasets.NAME` of a configuration stands for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blip.config.schema import DatasetConfig
from blip.data import catalog
from blip.data.catalog import CATALOG
from blip.data.datasets import EvalPairs, PairDataset
from blip.data.readers import detect
from blip.data.records import HfRecords, PackedRecords, read_records
from blip.data.samples import SampleMaker
from blip.data.shards import ShardDataset
from blip.data.tars import find_shards
from blip.errors import ConfigError, DataError, hint
from blip.registry import PROCESSORS

log = logging.getLogger(__name__)

_FILES = ("json", "jsonl", "csv", "tsv")
_SPLITS = {"train": ("train",), "val": ("val", "validation", "dev"), "test": ("test",)}


@dataclass
class Source:
    """Where one split of a dataset lies: existing files of one layout."""

    paths: list[Path]
    layout: str
    roots: list[Path | None]
    """For each path the folder that its image paths start from; None: the folder of the file."""
    columns: dict[str, str]
    named: list[str]
    """The catalogue's name where its files were looked for, else empty."""


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


def build_dataset(
    name: str,
    config: DatasetConfig,
    split: str = "train",
    data_root: str | Path | None = None,
    train: bool = True,
    image_size: int | None = None,
) -> PairDataset | EvalPairs | ShardDataset:
    """The dataset that a section describes. Call it on every rank.

    Args:
        name: of the section; a name of the catalogue fills in what is left out.
        config: the section.
        split: which of its splits.
        data_root: as `run.data_root`; see `catalog.data_root`.
        train: with the processors of training, one sample per caption; else for evaluation, without the
            pictures that cannot be read.
        image_size: side of the pictures where the section names no image processor.

    Raises:
        DataError: files, columns or pictures are missing, or there is nothing in them.
        ConfigError: processors or settings that do not go together.
    """
    if config.data_type != "images":
        raise ConfigError(
            f"datasets.{name}.data_type: {config.data_type!r} is no kind of files that image-text data can be"
            " read from; use images"
        )
    maker = make_maker(name, config, "train" if train else "eval", image_size)
    source = locate(name, config, split, data_root)
    if source.layout == "shards":
        if not train:
            raise ConfigError(
                f"datasets.{name}.path: shards are for training; evaluation needs a list of its pictures and"
                f" texts, as in path: {{{split}: {split}.json}}"
            )
        if config.max_samples is not None:
            raise ConfigError(f"datasets.{name}.max_samples: shards are not cut; name fewer of them in path")
        maker.columns = source.columns  # records of other layouts are renamed when they are read
        return ShardDataset(name, source.paths, maker, config.lanes, config.window, config.image_ids)
    records = read_source(name, source, config.max_samples)
    check_pictures(name, records, source.named)
    if train:
        return PairDataset(name, records, maker, config.image_ids)
    return EvalPairs(name, records, maker).verify()


def read_source(name: str, source: Source, limit: int | None = None) -> PackedRecords | HfRecords:
    """The records of a located split."""
    return read_records(source.paths, source.layout, source.columns, source.roots, name, limit)


def check_pictures(name: str, records: PackedRecords | HfRecords, named: Iterable[str] = ()) -> None:
    """Raise where none of the first pictures exists: that is a wrong folder, not damaged data.

    Raises:
        DataError: naming the first one.
    """
    places = []
    for i in range(min(len(records), 20)):
        record = records[i]
        place = records.image(i, record) if "image" in record else b""
        if isinstance(place, bytes) or Path(place).exists():
            return
        places.append(place)
    problem = (
        f"datasets.{name}.images: none of the first {len(places)} pictures is there, not even {places[0]!r}"
    )
    named = list(named)
    advice = f"set datasets.{name}.images to the folder that holds {records[0]['image']!r}"
    raise MissingData(problem, named, "" if named else advice)


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
    if layout == "shards" or any(text.endswith(".tar") for text in texts):
        return Source(_shards(name, texts, root, named), "shards", [], columns, named)
    paths = [_existing(name, text, root, named) for text in texts]
    if layout == "auto" and all(_detected(name, path) == "shards" for path in paths):
        return Source(_shards(name, texts, root, named), "shards", [], columns, named)
    return Source(paths, layout, _roots(name, config, split, paths, root), columns, named)


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
            found = dict(CATALOG[name].splits)
    if not found:
        raise DataError(
            f"datasets.{name}: not in the catalogue and without a path; give datasets.{name}.path, or a name"
            f" that 'blip data list' shows{hint(name, CATALOG)}"
        )
    if config.split is None:
        return found
    return {split: value for split, value in found.items() if split == config.split}


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
        images = _mapping(config.build_info.get("images")).get("storage")
        if images is not None and row and _foreign(_listed(images)):
            log.warning("datasets.%s.build_info: %s is not here; using the catalogue's", name, images)
            images = None
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


def _existing(name: str, text: str, root: Path, named: list[str]) -> Path:
    place = _place(text, root)
    if not place.exists():
        beside = sorted(p.name for p in place.parent.iterdir()) if place.parent.is_dir() else []
        problem = f"datasets.{name}.path: no file {text!r}{_under(text, root)}"
        advice = (
            f"correct datasets.{name}.path or run.data_root, or put the file there{hint(place.name, beside)}"
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


def make_maker(name: str, config: DatasetConfig, stage: str, image_size: int | None = None) -> SampleMaker:
    """The processors of a section for `train` or `eval`.

    A missing `eval` image processor follows from that of training: the same size and normalisation, nothing
    random. Text processors are not random, so either stands in for the other, and `blip_caption` for both.

    Raises:
        ConfigError: unknown processor or option, or no image processor for training.
    """
    where = f"datasets.{name}.vis_processor"
    if stage in config.vis_processor:
        vis = make_processor(config.vis_processor[stage], f"{where}.{stage}", images=True)
    elif stage == "eval" and "train" in config.vis_processor:
        given = make_processor(config.vis_processor["train"], f"{where}.train", images=True)
        same = {key: getattr(given, key) for key in ("image_size", "mean", "std") if hasattr(given, key)}
        kind = "clip_image_eval" if "clip" in config.vis_processor["train"]["name"] else "blip_image_eval"
        vis = PROCESSORS.get(kind)(**same)
    elif image_size is not None and not config.vis_processor:
        kind = "blip2_image_train" if stage == "train" else "blip_image_eval"
        vis = PROCESSORS.get(kind)(image_size=image_size)
    else:
        raise ConfigError(f"{where}.{stage}: not given; name one, such as {{name: blip_image_{stage}}}")
    texts = config.text_processor
    entry = texts.get(stage) or next(iter(texts.values()), {"name": "blip_caption"})
    text = make_processor(entry, f"datasets.{name}.text_processor.{stage}", images=False)
    return SampleMaker(vis, text, config.prompt)


def make_processor(entry: Mapping[str, Any], where: str, images: bool) -> Any:
    """The processor that `{name: ..., option: value}` describes.

    Args:
        entry: name and options.
        where: key path of the entry, for messages.
        images: whether it must be one for pictures, or one for texts.

    Raises:
        ConfigError: unknown name or option, or one of the other kind.
    """
    options = dict(entry)
    name = options.pop("name", None)
    try:
        cls = PROCESSORS.get(str(name))
    except ConfigError as error:
        raise ConfigError(f"{where}.name: {error}") from error
    if hasattr(cls, "pixels") != images:
        fitting = [n for n in PROCESSORS.names() if hasattr(PROCESSORS.get(n), "pixels") == images]
        kinds = ("texts", "pictures") if images else ("pictures", "texts")
        raise ConfigError(
            f"{where}.name: {name} is for {kinds[0]}, not {kinds[1]}; choose from {', '.join(fitting)}"
        )
    known = [f.name for f in fields(cls)]
    for option in options:
        if option not in known:
            raise ConfigError(f"{where}.{option}: no option of {name}{hint(option, known)}")
    try:
        return cls(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error
    except TypeError as error:
        raise ConfigError(f"{where}: {name} cannot use {options} ({error})") from error
