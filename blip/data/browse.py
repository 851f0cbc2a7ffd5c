"""Datasets to look at: pairs of a PIL picture and its text as they are stored, for `blip.load_dataset`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.random import Generator

from blip.config.schema import DatasetConfig
from blip.config.typed import typed_section
from blip.data.datasets import PairDataset
from blip.data.samples import BadRecord, SampleMaker, read_image
from blip.data.shards import ShardDataset
from blip.data.sources import (
    MissingData,
    Source,
    available_splits,
    check_pictures,
    locate,
    read_source,
    require_files,
)
from blip.errors import DataError, hint

log = logging.getLogger(__name__)


class Pairs:
    """The pairs of one split: `image` (PIL, as stored), `text_input`, `image_id`, `instance_id`.

    Iterating leaves out what cannot be read and logs how much that was.
    """

    def __init__(self, data: PairDataset | ShardDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        """Number of pairs; of shards without `sizes.json` counted or estimated."""
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Pair number `index`.

        Raises:
            BadRecord: it cannot be read.
            DataError: shards, which have no numbers.
        """
        if isinstance(self.data, ShardDataset):
            raise DataError(f"{self.data.name}: shards are read in sequence; iterate over them")
        return {**self.data.sample(range(len(self))[index])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        bad = 0
        for sample in _stored(self.data) if isinstance(self.data, ShardDataset) else _numbered(self.data):
            if isinstance(sample, BadRecord):
                bad += 1
            else:
                yield sample
        if bad:
            log.warning("datasets.%s: %d records cannot be read", self.data.name, bad)


@dataclass
class _Plain(SampleMaker):
    """Pictures and texts as they are."""

    vis_processor: Any = None
    text_processor: Callable[[str], str] = str

    def picture(self, image: bytes | str | Path, name: str, rng: Generator | None = None) -> Any:
        """`image` and `instance_id`, without pixels."""
        return {"image": read_image(image, name), "instance_id": name}


def open_splits(
    name: str,
    root: str | Path | None,
    splits: Sequence[str] | None,
    options: Mapping[str, Any],
) -> dict[str, Pairs]:
    """Split -> pairs; see `blip.load_dataset`.

    Raises:
        DataError: unknown name or split, or files that are missing.
        ConfigError: unknown or wrong options.
    """
    section = typed_section(DatasetConfig, {"argument": options}, ("datasets", name))
    having = available_splits(name, section, root)
    for split in splits or ():
        if split not in having:
            raise DataError(f"{name} has no split {split!r}{hint(split, having)}")
    present, missing = {}, []
    for split in splits or having:
        try:
            present[split] = locate(name, section, split, root)
        except MissingData as error:
            missing.append(error)
    if missing and (splits or not present):
        require_files([(name, section, split) for split in splits or having], root)
    for absent in missing:
        log.warning("%s", absent)
    return {split: _pairs(name, section, source) for split, source in present.items()}


def _pairs(name: str, section: DatasetConfig, source: Source) -> Pairs:
    maker = _Plain(prompt=section.prompt)
    if source.layout == "shards":
        maker.columns = source.columns
        return Pairs(ShardDataset(name, source.paths, maker, image_ids=section.image_ids))
    records = read_source(name, source, section.max_samples)
    check_pictures(name, records, source.named)
    return Pairs(PairDataset(name, records, maker, section.image_ids))


def _numbered(data: PairDataset) -> Iterator[Any]:
    for index in range(len(data)):
        try:
            yield data.sample(index)
        except BadRecord as error:
            yield error


def _stored(data: ShardDataset) -> Iterator[Any]:
    """The samples of shards in stored order."""
    for number, path in enumerate(data.paths):
        with path.open("rb") as file:
            for entry in data.scan(number):
                if isinstance(entry, BadRecord):
                    yield entry
                    continue
                try:
                    yield data.sample(entry, file, 0, 0)
                except BadRecord as error:
                    yield error
