"""What is in a dataset and what is wrong with it: pictures decoded, captions cleaned, all counted."""

from __future__ import annotations

import os
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from blip.data.datasets import Records
from blip.data.samples import BadRecord, SampleMaker, read_image
from blip.data.shards import ShardDataset
from blip.data.sources import Source, make_processor, read_source

CountTokens = Callable[[list[str]], list[int]]
"""Texts -> number of tokens of each."""

_SECONDS_BETWEEN_LINES = 10


def count_words(texts: list[str]) -> list[int]:
    """Words of each text: what stands for tokens where no tokenizer is named."""
    return [len(text.split()) for text in texts]


@dataclass
class Report:
    """What `check` found in one split."""

    name: str
    split: str
    count_tokens: CountTokens = count_words
    records: int = 0
    pictures: int = 0
    """Different pictures; in shards every sample has its own."""
    checked: int = 0
    """Pictures that were decoded, or failed to."""
    bad: list[BadRecord] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    """A line each for some samples in order, the first and the last among them: name, size, mode, caption."""
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Tokens of each usable caption."""
    _uncounted: list[str] = field(default_factory=list)

    @property
    def captions(self) -> int:
        """Usable captions."""
        return len(self.lengths) + len(self._uncounted)

    @property
    def bad_ratio(self) -> float:
        """Share of records that cannot be used, of those that were looked at."""
        return len(self.bad) / max(1, len(self.bad) + self.captions)

    def add(self, texts: list[str], final: bool = False) -> None:
        """Count the tokens of usable captions, a thousand texts at a time."""
        self._uncounted += texts
        if len(self._uncounted) >= 1000 or final:
            self.lengths.extend(self.count_tokens(self._uncounted) if self._uncounted else [])
            self._uncounted = []

    def describe(self, line: str) -> None:
        """Keep a sample's line; of very many, every second one."""
        if len(self.samples) > 1000:
            self.samples = self.samples[::2]
        self.samples.append(line)

    def lines(self) -> list[str]:
        """The report for people."""
        causes = Counter(error.cause for error in self.bad).most_common()
        sizes = np.percentile(self.lengths or [0], [0, 50, 95, 100]).astype(int).tolist()
        totals = f"{self.records} records, {self.pictures} pictures, {self.captions} captions"
        found = [
            f"{self.name} {self.split}: {totals}",
            f"  pictures read:  {self.checked} of {self.pictures}",
            "  caption tokens: min {}, median {}, 95% {}, max {}".format(*sizes),
            "  unusable:       " + (", ".join(f"{n} {cause}" for cause, n in causes) or "none"),
        ]
        found += [f"    {error}" for error in self.bad[:5]]
        found += [f"    and {len(self.bad) - 5} more"] if len(self.bad) > 5 else []
        shown = sorted({0, len(self.samples) // 2, len(self.samples) - 1}) if self.samples else []
        return found + [f"  sample {self.samples[i]}" for i in shown]


def check_split(
    name: str,
    split: str,
    source: Source,
    count_tokens: CountTokens = count_words,
    limit: int | None = None,
    threads: int | None = None,
) -> Report:
    """Look at a whole split, or at `limit` pictures spread over it.

    Args:
        name: of the dataset, for messages.
        split: likewise.
        source: its files, as `sources.locate` finds them.
        count_tokens: what measures captions.
        limit: number of pictures (in shards: of samples) to read; None: all.
        threads: decoders at work; None: one per core, at most 8.

    Raises:
        DataError: the files as a whole cannot be used.
    """
    report = Report(name, split, count_tokens)
    # LAVIS's caption processor, but for its limit of words: what it would cut off is worth knowing.
    clean = make_processor({"name": "blip_caption", "max_words": 1_000_000}, "text_processor", images=False)
    maker = _Looker(_Undecoded(), clean, columns=source.columns)
    if source.layout == "shards":
        work = _of_shards(report, ShardDataset(name, source.paths, maker, image_ids=False), limit)
    else:
        maker.columns = {}
        work = _of_records(report, read_source(name, source), maker, limit)
    _read_all(report, work, threads or min(8, os.cpu_count() or 1))
    report.add([], final=True)
    return report


class _Undecoded:
    """Stands where a maker has an image processor; pictures are only decoded here, and by other threads."""

    def pixels(self, image: Any, rng: Generator | None = None) -> Any:
        return image

    def norm(self) -> Any:
        return None


class _Looker(SampleMaker):
    """Gives all captions and the undecoded picture of a record, for shards that make their own samples."""

    def __call__(
        self, record: Any, image: bytes | str | Path, name: str, rng: Generator | None = None
    ) -> Any:
        texts, bad = self.texts(record, name)
        return {"texts": texts, "bad": bad, "content": image}

    def texts(self, record: dict[str, Any], name: str) -> tuple[list[str], list[BadRecord]]:
        """The usable captions of a record, and what is wrong with the others."""
        try:
            captions = self.captions(record, name)
        except BadRecord as error:
            return [], [error]
        texts, bad = [], []
        for number, caption in enumerate(captions if isinstance(captions, list) and captions else [captions]):
            try:
                texts.append(self.text(caption, f"{name}#{number}" if number else name))
            except BadRecord as error:
                bad.append(error)
        return texts, bad


_Work = Iterator[tuple[str, "str | bytes", str]]
"""(name, picture, caption) of every picture to decode."""


def _of_records(report: Report, records: Records, maker: _Looker, limit: int | None) -> _Work:
    report.records, report.pictures = len(records), records.num_pictures
    chosen = _spread(records.num_pictures, limit)
    seen = np.zeros(records.num_pictures, bool)
    for number in range(len(records)):
        name, record = f"{report.name}/{number}", records[number]
        texts, bad = maker.texts(record, name)
        report.bad += bad
        report.add(texts)
        picture = int(records.pictures[number])
        if texts and not seen[picture] and picture in chosen:
            seen[picture] = True
            try:
                place = records.image(number, record)
            except KeyError:
                report.bad.append(BadRecord("missing_image", name, "the record names no picture"))
                continue
            yield name, place, texts[0]


def _of_shards(report: Report, shards: ShardDataset, limit: int | None) -> _Work:
    # Where there are too many shards to count, the total is an estimate: what is beyond it is looked at, too.
    total = shards.num_samples
    chosen = _spread(total, limit)
    for shard, path in enumerate(shards.paths):
        with path.open("rb") as file:
            for ref in shards.scan(shard):
                if isinstance(ref, BadRecord):
                    report.bad.append(ref)
                    continue
                number = report.records
                report.records = report.pictures = number + 1
                if number < total and number not in chosen:
                    continue
                try:
                    found = shards.sample(ref, file, 0, 0)
                except BadRecord as error:
                    report.bad.append(error)
                    continue
                report.bad += found["bad"]
                report.add(found["texts"])
                if found["texts"]:
                    yield f"{shards.labels[shard]}/{ref.key}", found["content"], found["texts"][0]


def _spread(total: int, limit: int | None) -> range | set[int]:
    if limit is None or limit >= total:
        return range(total)
    return set(np.linspace(0, total - 1, limit).round().astype(int).tolist())


def _read_all(report: Report, work: _Work, threads: int) -> None:
    """Decode all pictures in threads (decoders release the interpreter), in order."""
    waiting: deque[Future[str | BadRecord]] = deque()
    began = told = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for name, place, caption in work:
            waiting.append(pool.submit(_describe, name, place, caption))
            if len(waiting) > 4 * threads:  # pictures of shards wait in memory
                _note(report, waiting.popleft().result())
            if (now := time.monotonic()) - told > _SECONDS_BETWEEN_LINES:
                told = now
                rate = f"{report.checked} pictures, {report.checked / (now - began):.0f} per second"
                print(f"{report.name} {report.split}: {rate}", file=sys.stderr, flush=True)
        for future in waiting:
            _note(report, future.result())


def _note(report: Report, result: str | BadRecord) -> None:
    report.checked += 1
    if isinstance(result, BadRecord):
        report.bad.append(result)
    else:
        report.describe(result)


def _describe(name: str, place: str | bytes, caption: str) -> str | BadRecord:
    try:
        image = read_image(place, name)
    except BadRecord as error:
        return error
    return f"{name}: {image.width} x {image.height} {image.mode}, {caption!r}"
