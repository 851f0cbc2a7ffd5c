"""Datasets to look at: PIL pictures and their texts as they are stored, for `blip.load_dataset`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.random import Generator
from PIL import Image

from blip.config.schema import DatasetConfig
from blip.config.typed import typed_section
from blip.data.collate import Flat
from blip.data.datasets import PairDataset
from blip.data.instruct import InstructMaker
from blip.data.kinds import LabelMaker, PairMaker, QuestionMaker
from blip.data.locate import MissingData, Source, available_splits, locate, require_files
from blip.data.samples import BadRecord, Sample, SampleMaker
from blip.data.sources import check_pictures, class_names, found_kind, read_source, shows_videos
from blip.data.streams.shards import ShardDataset
from blip.data.video import a_few
from blip.errors import DataError, hint

log = logging.getLogger(__name__)


class Pairs:
    """What one split holds, by number: `image` (PIL, as stored), `text_input`, `instance_id`, and by its kind

    - captions: `image_id`;
    - instructions: `text_output`;
    - questions: `answer` and `weight`, lists of the different answers and their shares; `question_id`;
    - sentences: `label`; about two pictures `image0` and `image1` in place of `image`.

    Of a video, `image` is a list of up to eight frames.

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
        return _shown(self.data.sample(range(len(self))[index]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        bad = 0
        for sample in _stored(self.data) if isinstance(self.data, ShardDataset) else _numbered(self.data):
            if isinstance(sample, BadRecord):
                bad += 1
            else:
                yield _shown(sample)
        if bad:
            log.warning("datasets.%s: %d records cannot be read", self.data.name, bad)


class _AsStored:
    """Stands where a maker has an image processor."""

    def pixels(self, image: Image.Image, rng: Generator | None = None) -> Any:
        return image

    def norm(self) -> Any:
        return None


class _FramesAsStored(_AsStored):
    """Likewise of videos; up to eight frames are shown."""

    def frames(self, total: int, rng: Generator | None = None) -> list[int]:
        return a_few(total)

    def clip(self, frames: Sequence[Image.Image], rng: Generator | None = None) -> Any:
        return list(frames)


@dataclass
class _Questions(QuestionMaker):
    """Questions with their ids."""

    def content(self, record: Mapping[str, Any], name: str, rng: Generator | None = None) -> Any:
        """Question, its id, and answers where there are any."""
        sample: dict[str, Any] = {**super().content(record, name, rng)}
        return sample | {key: record[key] for key in ("question_id",) if key in record}


@dataclass
class _Pictures(SampleMaker):
    """Pictures without captions."""

    def content(self, record: Mapping[str, Any], name: str, rng: Generator | None = None) -> Sample:
        """Nothing."""
        return {}


def _shown(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample without what serves batches only."""
    shown = {key: value for key, value in sample.items() if key not in ("image_norm", "n_answers")}
    return {key: list(value) if isinstance(value, Flat) else value for key, value in shown.items()}


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
    return {split: _pairs(name, section, source, root) for split, source in present.items()}


def _pairs(name: str, section: DatasetConfig, source: Source, root: str | Path | None) -> Pairs:
    plain: tuple[Any, Callable[[str], str], str] = (_AsStored(), str, section.prompt)
    if source.layout == "shards":
        maker = SampleMaker(*plain, columns=source.columns)
        return Pairs(ShardDataset(name, source.shards, maker, image_ids=section.image_ids))
    records = read_source(name, source, section.max_samples)
    kind = found_kind(source, records)
    classes = class_names(name, section, kind, source, records, root, training=False)
    if shows_videos(section, records.columns):
        plain = (_FramesAsStored(), str, section.prompt)
    makers = {
        "instruct": InstructMaker(*plain),
        "caption": SampleMaker(*plain) if source.captioned else _Pictures(*plain),
        "vqa": _Questions(*plain, answer_weight=section.answer_weight, answered=None),
        "nlvr": PairMaker(*plain, classes=classes, cut=section.cut),
        "classification": LabelMaker(*plain, classes=classes),
    }
    check_pictures(name, records, makers[kind], source.named)
    return Pairs(PairDataset(name, records, makers[kind], section.image_ids and kind == "caption"))


def _numbered(data: PairDataset) -> Iterator[Any]:
    for index in range(len(data)):
        try:
            yield data.sample(index)
        except BadRecord as error:
            yield error


def _stored(data: ShardDataset) -> Iterator[Any]:
    """The samples of shards in stored order."""
    for number in range(len(data.labels)):
        for entry in data.stored(number):
            if isinstance(entry, BadRecord):
                yield entry
                continue
            file, ref = entry
            try:
                yield data.sample(ref, file, 0, 0)
            except BadRecord as error:
                yield error
