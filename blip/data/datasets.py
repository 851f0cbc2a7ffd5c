"""Map-style datasets to train on, of any kind of records; what cannot be read is replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from blip import keyed
from blip.data.samples import BadRecord, Clip, Picture, Sample, SampleMaker
from blip.errors import DataError

MAX_SUBSTITUTES = 20


class Records(Protocol):
    """What a dataset needs of its records, as `blip.data.records` reads them; n records."""

    pictures: np.ndarray
    """int64 (n,): number of each record's picture, consecutive from 0 in order of appearance."""
    num_pictures: int
    num_captions: np.ndarray
    """int32 (n,): captions of each record."""
    columns: tuple[str, ...]
    """Our names of the columns that the records have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def picture(self, index: int, entry: Any) -> str | bytes:
        """Path or content of a picture, from what record `index` has in its place."""
        ...

    def where(self, index: int) -> str:
        """File and number within it of a record, for messages."""
        ...

    def origin(self, index: int) -> tuple[str, str]:
        """The file of a record, and the folder that its picture's path starts from."""
        ...


class PairDataset:
    """Records of any kind to train on, by number; one with several captions counts once for each.

    Memory is flat: NumPy arrays only, which forked workers share.

    Args:
        name: of the dataset; keys its randomness and names its records.
        records: what to read.
        maker: record -> sample.
        image_ids: give each sample `image_id`, its picture's number.
    """

    def __init__(self, name: str, records: Records, maker: SampleMaker, image_ids: bool = True) -> None:
        self.name = name
        self.records = records
        self.maker = maker
        self.image_ids = image_ids
        self.num_images = records.num_pictures
        self._ends: np.ndarray | None = None
        if maker.per_caption and len(records) and records.num_captions.max() > 1:
            # A record without captions keeps its place, to be counted as such.
            self._ends = np.cumsum(np.maximum(records.num_captions, 1), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.records) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample as drawn in epoch 0 with seed 0."""
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0, seed: int = 0) -> Sample:
        """Sample `index`; its augmentation is a function of all three arguments.

        Raises:
            BadRecord: it cannot be read.
        """
        sample = self._sample(index, epoch, seed)
        sample.pop("damaged", None)
        return sample

    def _sample(self, index: int, epoch: int, seed: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples; there is no number {index}")
        number, which = self._locate(index)
        name = self._name(number, which)
        record = self.records[number]
        rng = keyed.generator(seed, "augment", self.name, epoch, index)
        try:
            record = self.maker.single(record, which, name)
            sample = self.maker(
                record, pictures_of(self.records, number, record, self.maker, name), name, rng
            )
        except BadRecord as error:
            raise BadRecord(error.cause, name, self._detail(number, error)) from error
        if self.image_ids:
            sample["image_id"] = int(self.records.pictures[number])
        return sample

    def sample_or_substitute(self, index: int, epoch: int, seed: int) -> tuple[Sample, list[BadRecord]]:
        """Sample `index`, or another one where it is bad; and the bad records and frames met on the way.

        The substitute is a function of the arguments too, so batches keep their size and a resumed or
        redistributed run sees the same ones.

        Raises:
            DataError: none of `MAX_SUBSTITUTES` substitutes can be read either.
        """
        bad: list[BadRecord] = []
        probe = index
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                sample = self._sample(probe, epoch, seed)
                return sample, bad + sample.pop("damaged", [])
            except BadRecord as error:
                bad.append(error)
            rng = keyed.generator(seed, "substitute", self.name, epoch, index, attempt)
            probe = int(rng.integers(len(self)))
        cause = bad[-1].cause
        wrong = (
            "images"
            if cause in ("missing_image", "missing_video")
            else "columns"
            if cause.startswith("no_")
            else "path"
        )
        wrong = "classes" if cause == "bad_label" else wrong
        raise DataError(
            f"datasets.{self.name}: {len(bad)} records in a row cannot be read ({causes(bad)}; the last is"
            f" {bad[-1]}); check datasets.{self.name}.{wrong}; 'blip data check' shows every such record"
        )

    def _locate(self, index: int) -> tuple[int, int]:
        """(record, which of its captions) of a sample."""
        if self._ends is None:
            return index, 0
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def _detail(self, number: int, error: BadRecord) -> str:
        return f"{self.records.where(number)}: {error.detail}".removesuffix(": ")

    def _name(self, number: int, which: int) -> str:
        return f"{self.name}/{number}" + (f"#{which}" if which else "")


def pictures_of(
    records: Records, number: int, record: dict[str, Any], maker: SampleMaker, name: str
) -> Picture | Clip | list[Picture]:
    """Path or content of a record's picture; a list where it has several; its video.

    Raises:
        BadRecord: the record names none.
    """
    entries = maker.places(record, name)
    found: list[Picture] = [records.picture(number, entry) for entry in entries]
    if maker.of_videos:
        return Clip(tuple(place if isinstance(place, bytes) else str(place) for place in found))
    return found if len(found) > 1 else found[0]


def causes(bad: Iterable[BadRecord]) -> str:
    """How many records are bad, by cause."""
    return ", ".join(f"{n} {cause}" for cause, n in Counter(error.cause for error in bad).most_common())
