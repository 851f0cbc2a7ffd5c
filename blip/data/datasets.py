"""Map-style datasets: pairs to train on, pictures and texts to evaluate on; the count of what is skipped."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from blip import dist, keyed
from blip.data.samples import BadRecord, Sample, SampleMaker, read_image
from blip.errors import DataError

__all__ = ["BadRecord", "EvalPairs", "PairDataset", "Records", "Sample", "SampleMaker"]

log = logging.getLogger(__name__)

MAX_SUBSTITUTES = 20


class Records(Protocol):
    """What a dataset needs of its records, as `blip.data.records` reads them; n records."""

    pictures: np.ndarray
    """int64 (n,): number of each record's picture, consecutive from 0 in order of appearance."""
    num_pictures: int
    num_captions: np.ndarray
    """int32 (n,): captions of each record."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def image(self, index: int, record: dict[str, Any]) -> str | bytes:
        """Path or content of a record's picture."""
        ...

    def where(self, index: int) -> str:
        """File and number within it of a record, for messages."""
        ...


class PairDataset:
    """Image-text pairs to train on, by number; a record with several captions counts once for each.

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
        if len(records) and records.num_captions.max() > 1:
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
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples; there is no number {index}")
        number, which = self._locate(index)
        name = self._name(number, which)
        record = self.records[number]
        rng = keyed.generator(seed, "augment", self.name, epoch, index)
        try:
            captions = self.maker.captions(record, name)
            if isinstance(captions, list) and captions:
                record = {**record, "caption": captions[which]}
            sample = self.maker(record, _source(self.records, number, record, name), name, rng)
        except BadRecord as error:
            raise BadRecord(error.cause, name, self._detail(number, error)) from error
        if self.image_ids:
            sample["image_id"] = int(self.records.pictures[number])
        return sample

    def sample_or_substitute(self, index: int, epoch: int, seed: int) -> tuple[Sample, list[BadRecord]]:
        """Sample `index`, or another one where it is bad; and the bad records met on the way.

        The substitute is a function of the arguments too, so batches keep their size and a resumed or
        redistributed run sees the same ones.

        Raises:
            DataError: none of `MAX_SUBSTITUTES` substitutes can be read either.
        """
        bad: list[BadRecord] = []
        probe = index
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                return self.sample(probe, epoch, seed), bad
            except BadRecord as error:
                bad.append(error)
            rng = keyed.generator(seed, "substitute", self.name, epoch, index, attempt)
            probe = int(rng.integers(len(self)))
        wrong = {"missing_image": "images", "no_caption": "columns"}.get(bad[-1].cause, "path")
        raise DataError(
            f"datasets.{self.name}: {len(bad)} records in a row cannot be read ({_causes(bad)}; the last is"
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


class EvalPairs:
    """Pictures, texts, and who belongs to whom: what LAVIS's evaluation datasets expose.

    `image_id` of a sample is its number here. Records that cannot be used are left out and stand in `bad`, so
    that scores are of the rest; a picture without any text is left out too.

    Args:
        name: of the dataset.
        records: pictures in order of appearance.
        maker: with the processors of evaluation.
    """

    def __init__(self, name: str, records: Records, maker: SampleMaker) -> None:
        self.name = name
        self.records = records
        self.maker = maker
        self.bad: list[BadRecord] = []
        self.lost = 0
        """Texts that are left out, for themselves or for their picture."""
        texts: dict[int, list[str]] = {}
        first: dict[int, int] = {}
        for number in range(len(records)):
            picture = int(records.pictures[number])
            first.setdefault(picture, number)
            texts.setdefault(picture, []).extend(self._texts(number))
        self._first = [first[picture] for picture in texts if texts[picture]]
        self.lost = len(self.bad)
        self._index([found for found in texts.values() if found])

    def _texts(self, number: int) -> list[str]:
        name, texts = f"{self.name}/{number}", []
        try:
            captions = self.maker.captions(self.records[number], name)
        except BadRecord as error:
            self.bad.append(error)
            return []
        several = captions if isinstance(captions, list) and captions else [captions]
        for which, caption in enumerate(several):
            try:
                texts.append(self.maker.text(caption, f"{name}#{which}" if which else name))
            except BadRecord as error:
                self.bad.append(error)
        return texts

    def _index(self, texts: Sequence[Sequence[str]]) -> None:
        if not texts:
            raise DataError(
                f"datasets.{self.name}: nothing to evaluate on, all {len(self.records)} records are unusable"
                f" ({_causes(self.bad)}); see 'blip data check'"
            )
        self.text = [text for several in texts for text in several]
        """All texts, through the text processor of evaluation."""
        self.txt2img = [image for image, several in enumerate(texts) for _ in several]
        """Number of each text's picture."""
        ends = np.cumsum([len(several) for several in texts]).tolist()
        self.img2txt = [list(range(end - len(s), end)) for s, end in zip(texts, ends, strict=True)]
        """Numbers of each picture's texts."""

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._first)

    def __getitem__(self, index: int) -> Sample:
        return self.image(index)

    def instance_id(self, index: int) -> str:
        """Name of picture `index`."""
        return f"{self.name}/{self._first[index]}"

    def image(self, index: int) -> Sample:
        """Picture `index`: image, image_norm, image_id and instance_id, no text.

        Raises:
            BadRecord: it cannot be read.
        """
        # Evaluation processors draw nothing; with a training one, pictures are at least the same each time.
        rng = keyed.generator(0, "evaluate", self.name, index)
        sample = self.maker.picture(self._source(index), self.instance_id(index), rng)
        sample["image_id"] = index
        return sample

    def picture(self, index: int) -> str | None:
        """Path of picture `index`; None where it is no file of its own."""
        source = self._source(index)
        return str(Path(source).absolute()) if isinstance(source, str) else None

    def pair(self, text: int) -> Sample:
        """Text number `text` with its picture, for losses on held-out pairs."""
        return {**self.image(self.txt2img[text]), "text_input": self.text[text]}

    def verify(self, threads: int | None = None) -> EvalPairs:
        """Leave out the pictures that cannot be decoded; every rank reads its share of them.

        What is left out is added to `bad` and reported. Call it on every rank.

        Returns:
            Itself.
        """
        start, end = dist.slices(len(self))[dist.rank()]
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:  # decoders release the lock
            own = [(i, e) for i, e in enumerate(pool.map(self._try, range(start, end)), start) if e]
        found = {i: error for part in dist.gather_objects(own) for i, error in part}
        if found:
            self.bad += found.values()
            self.lost += sum(len(self.img2txt[i]) for i in found)
            kept = [i for i in range(len(self)) if i not in found]
            texts = [[self.text[t] for t in self.img2txt[i]] for i in kept]
            self._first = [self._first[i] for i in kept]
            self._index(texts)
        if self.bad:
            log.warning(
                "datasets.%s: %d records are left out of the evaluation (%s), the first is %s",
                *(self.name, len(self.bad), _causes(self.bad), self.bad[0]),
            )
        return self

    def _try(self, index: int) -> BadRecord | None:
        try:
            read_image(self._source(index), self.instance_id(index))
        except BadRecord as error:
            return error
        return None

    def _source(self, index: int) -> str | bytes:
        number = self._first[index]
        return _source(self.records, number, self.records[number], self.instance_id(index))


def _source(records: Records, number: int, record: dict[str, Any], name: str) -> str | bytes:
    try:
        return records.image(number, record)
    except KeyError as error:
        raise BadRecord("missing_image", name, f"the record has no {error}") from error


def _causes(bad: Iterable[BadRecord]) -> str:
    return ", ".join(f"{n} {cause}" for cause, n in Counter(error.cause for error in bad).most_common())
