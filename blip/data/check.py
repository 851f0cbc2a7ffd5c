"""What is in a dataset and what is wrong with it: pictures decoded, texts cleaned, all counted."""

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
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator

from blip.config.schema import DatasetConfig
from blip.data.datasets import Records, pictures_of
from blip.data.instruct import InstructMaker
from blip.data.kinds import KINDS, LabelMaker, PairMaker, QuestionMaker
from blip.data.locate import Source
from blip.data.makers import make_processor
from blip.data.samples import BadRecord, Clip, SampleMaker, read_clip, read_image, sound
from blip.data.sources import class_names, found_kind, read_source, shows_videos
from blip.data.streams.shards import ShardDataset
from blip.data.video import a_few

CountTokens = Callable[[list[str]], list[int]]
"""Texts -> number of tokens of each."""

_SECONDS_BETWEEN_LINES = 10
_MOST_FETCHED = 3
"""Remote shards that are looked at where the number of pictures is limited."""


def count_words(texts: list[str]) -> list[int]:
    """Words of each text: what stands for tokens where no tokenizer is named."""
    return [len(text.split()) for text in texts]


@dataclass
class Report:
    """What `check` found in one split."""

    name: str
    split: str
    count_tokens: CountTokens = count_words
    noun: str = "captions"
    """What the texts are called."""
    records: int = 0
    pictures: int = 0
    """Different pictures, or pairs of them; in shards every sample has its own."""
    checked: int = 0
    """Pictures that were decoded, or failed to."""
    judged: int = 0
    """Usable texts of records whose picture was looked at; a record that needs no text has one."""
    lost: int = 0
    """Those of them whose picture cannot be used."""
    bad_texts: int = 0
    """Texts, records and shards that cannot be used, whatever their picture."""
    bad: list[BadRecord] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    """A line each for some samples in order, the first and the last among them: name, size, mode, text."""
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Tokens of each usable text."""
    _uncounted: list[str] = field(default_factory=list)

    @property
    def texts(self) -> int:
        """Usable texts."""
        return len(self.lengths) + len(self._uncounted)

    @property
    def bad_ratio(self) -> float:
        """Share of texts that cannot be used, or their picture cannot; what a run would count.

        Where only some pictures were looked at, the others are taken to be as they are.
        """
        wrong = self.bad_texts / max(1, self.bad_texts + (self.texts or self.judged))
        return wrong + (1 - wrong) * self.lost / max(1, self.judged)

    def note(self, bad: list[BadRecord]) -> None:
        """Count what cannot be used for another reason than its picture."""
        self.bad += bad
        self.bad_texts += len(bad)

    def add(self, texts: list[str], final: bool = False) -> None:
        """Count the tokens of usable texts, a thousand at a time."""
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
        totals = f"{self.records} records, {self.pictures} pictures, {self.texts} {self.noun}"
        found = [
            f"{self.name} {self.split}: {totals}",
            f"  pictures read:  {self.checked} of {self.pictures}",
            f"  {self.noun[:-1]} tokens: " + "min {}, median {}, 95% {}, max {}".format(*sizes),
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
    config: DatasetConfig,
    data_root: str | Path | None = None,
    count_tokens: CountTokens = count_words,
    limit: int | None = None,
    threads: int | None = None,
) -> Report:
    """Look at a whole split, or at `limit` pictures spread over it.

    Args:
        name: of the dataset, for messages.
        split: likewise.
        source: its files, as `locate` finds them.
        config: its section.
        data_root: as `run.data_root`.
        count_tokens: what measures texts.
        limit: number of pictures (in shards: of samples) to read; None: all.
        threads: decoders at work; None: one per core, at most 8.

    Raises:
        DataError: the files as a whole cannot be used.
    """
    report = Report(name, split, count_tokens)
    if source.layout == "shards":
        looker = _Looker(_Undecoded(), _cleaner("caption"), columns=source.columns)
        shards = ShardDataset(name, source.shards, looker, image_ids=False)
        _read_all(report, _of_shards(report, shards, limit), threads or _threads())
    else:
        records = read_source(name, source)
        kind = found_kind(source, records)
        report.noun = KINDS[kind].noun
        clips = shows_videos(config, records.columns)
        parts = (_UndecodedFrames() if clips else _Undecoded(), _cleaner(kind))
        maker: SampleMaker = _Looker(*parts) if source.captioned else _Pictures(*parts)
        classes = class_names(name, config, kind, source, records, data_root, training=False)
        if kind == "instruct":
            maker = InstructMaker(*parts, answered=True if split == "train" else None)
        elif kind == "vqa":
            chosen = {"choices", "correct_choice"} <= set(records.columns)  # which may stand for answers
            maker = QuestionMaker(*parts, answered=True if split == "train" and not chosen else None)
        elif kind == "nlvr":
            maker = PairMaker(*parts, classes=classes)
        elif kind == "classification":
            maker = LabelMaker(*parts, classes=classes)
        shown = _Shown(len(records))
        failed = _read_all(report, _of_records(report, records, maker, limit, shown), threads or _threads())
        _note_others(report, shown, failed)
    report.add([], final=True)
    return report


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _cleaner(kind: str) -> Any:
    """LAVIS's text processor, but for its limit of words: what it would cut off is worth knowing."""
    entry = {"name": KINDS[kind].text_processor, "max_words": 1_000_000}
    return make_processor(entry, "text_processor", images=False)


class _Undecoded:
    """Stands where a maker has an image processor; pictures are only decoded here, and by other threads."""

    def pixels(self, image: Any, rng: Generator | None = None) -> Any:
        return image

    def norm(self) -> Any:
        return None


class _UndecodedFrames(_Undecoded):
    """Likewise of videos, of which up to eight frames are decoded."""

    def frames(self, total: int, rng: Generator | None = None) -> Any:
        return a_few(total)

    def clip(self, frames: Any, rng: Generator | None = None) -> Any:
        return frames


class _Looker(SampleMaker):
    """Gives all captions and the undecoded picture of a record, for shards that make their own samples."""

    def __call__(self, record: Any, image: Any, name: str, rng: Generator | None = None) -> Any:
        texts, bad = self.usable(record, name)
        return {"texts": texts, "bad": bad, "content": image}

    def usable(self, record: dict[str, Any], name: str) -> tuple[list[str], list[BadRecord]]:
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


class _Pictures(SampleMaker):
    """Pictures without captions."""

    def content(self, record: Any, name: str, rng: Generator | None = None) -> Any:
        """Nothing."""
        sound(record, name)
        return {}


class _Look(NamedTuple):
    """A picture that is to be decoded."""

    name: str
    """Of the record."""
    place: Any
    """Path or content, the list of several, or a video."""
    text: str
    texts: int
    """Usable texts of the record."""
    key: int
    """Equal for equal places."""


class _Shown:
    """What each of n records shows, so that a picture of many records is decoded once and counted for all."""

    def __init__(self, n: int) -> None:
        self.keys = np.zeros(n, np.int64)
        """Of the picture, where there is one."""
        self.texts = np.zeros(n, np.int32)
        """Usable texts whose picture is to be judged."""
        self.looked = np.zeros(n, bool)
        """Whether the picture was decoded for this record."""


def _of_records(
    report: Report, records: Records, maker: SampleMaker, limit: int | None, shown: _Shown
) -> Iterator[_Look]:
    report.records, report.pictures = len(records), records.num_pictures
    chosen = _spread(records.num_pictures, limit)
    seen, first = np.zeros(records.num_pictures, bool), np.zeros(records.num_pictures, np.int64)
    for number in range(len(records)):
        name, record = f"{report.name}/{number}", records[number]
        texts, bad = _texts(maker, record, name)
        report.note(bad)
        report.add([text for text in texts if text])
        picture = int(records.pictures[number])
        if not texts or picture not in chosen:
            continue
        try:
            place = pictures_of(records, number, record, maker, name)
        except BadRecord as error:
            report.bad.append(error)
            report.judged += len(texts)
            report.lost += len(texts)
            continue
        key = hash(tuple(place) if isinstance(place, list) else place)
        shown.keys[number], shown.texts[number] = key, len(texts)
        # Records that share an `image_id` may still name different files.
        if not seen[picture] or first[picture] != key:
            first[picture] = first[picture] if seen[picture] else key
            seen[picture] = shown.looked[number] = True
            yield _Look(name, place, texts[0], len(texts), key)


def _note_others(report: Report, shown: _Shown, failed: dict[int, BadRecord]) -> None:
    """Count the records whose picture was looked at for another record."""
    others = (shown.texts > 0) & ~shown.looked
    report.judged += int(shown.texts[others].sum())
    for number in np.flatnonzero(others & np.isin(shown.keys, list(failed))).tolist():
        error = failed[int(shown.keys[number])]
        report.bad.append(BadRecord(error.cause, f"{report.name}/{number}", error.detail))
        report.lost += int(shown.texts[number])


def _texts(maker: SampleMaker, record: dict[str, Any], name: str) -> tuple[list[str], list[BadRecord]]:
    """The usable texts of a record, an empty one where it needs none, and what is wrong with the others."""
    if isinstance(maker, _Looker):
        return maker.usable(record, name)
    try:
        content = maker.content(record, name)
        texts = [content.get("text_input", ""), content.get("text_output", "")]
        return [" ".join(filter(None, texts))], []
    except BadRecord as error:
        return [], [error]


def _of_shards(report: Report, shards: ShardDataset, limit: int | None) -> Iterator[_Look]:
    # Where there are too many shards to count, the total is an estimate; a whole check looks beyond it.
    total, numbers = shards.num_samples, list(range(len(shards.labels)))
    if limit is not None and shards.shards.remote:  # so many pictures are no reason to fetch all shards
        some = sorted(_spread(len(numbers), min(limit, _MOST_FETCHED)))
        total, numbers = max(1, total * len(some) // len(numbers)), some
    chosen = _spread(total, limit)
    for shard in numbers:
        for entry in shards.stored(shard, ahead=len(numbers) == len(shards.labels)):
            if isinstance(entry, BadRecord):
                report.note([entry])
                continue
            file, ref = entry
            number = report.records
            report.records = report.pictures = number + 1
            if number not in chosen and (number < total or limit is not None):
                continue
            try:
                found = shards.sample(ref, file, 0, 0)
            except BadRecord as error:
                report.note([error])
                continue
            texts = found["texts"]
            report.note(found["bad"])
            report.add(texts)
            if texts:
                name = f"{shards.labels[shard]}/{ref.key}"
                yield _Look(name, found["content"], texts[0], len(texts), number)


def _spread(total: int, limit: int | None) -> range | set[int]:
    if limit is None or limit >= total:
        return range(total)
    return set(np.linspace(0, total - 1, limit).round().astype(int).tolist())


def _read_all(report: Report, work: Iterator[_Look], threads: int) -> dict[int, BadRecord]:
    """Decode all pictures in threads (decoders release the interpreter), in order; what is wrong, by key."""
    waiting: deque[tuple[_Look, Future[str | list[BadRecord]]]] = deque()
    failed: dict[int, BadRecord] = {}
    began = told = time.monotonic()

    def note() -> None:
        look, future = waiting.popleft()
        result = future.result()
        report.checked += 1
        report.judged += look.texts
        if isinstance(result, str):
            report.describe(result)
            return
        report.bad += result
        if any(error.cause != "damaged_frame" for error in result):  # others stand in for a frame
            report.lost += look.texts
            failed[look.key] = result[0]

    with ThreadPoolExecutor(threads) as pool:
        for look in work:
            describe = _describe_clip if isinstance(look.place, Clip) else _describe
            waiting.append((look, pool.submit(describe, look.name, look.place, look.text)))
            if len(waiting) > 4 * threads:  # pictures of shards wait in memory
                note()
            if (now := time.monotonic()) - told > _SECONDS_BETWEEN_LINES:
                told = now
                rate = f"{report.checked} pictures, {report.checked / (now - began):.0f} per second"
                print(f"{report.name} {report.split}: {rate}", file=sys.stderr, flush=True)
        while waiting:
            note()
    return failed


def _describe_clip(name: str, clip: Clip, text: str) -> str | list[BadRecord]:
    try:
        frames, damaged = read_clip(clip, name, a_few)
    except BadRecord as error:
        return [error]
    first = frames[0]
    size = f"frames of {first.width} x {first.height} {first.mode}"
    return damaged or f"{name}: {size}" + (f", {text!r}" if text else "")


def _describe(name: str, place: Any, text: str) -> str | list[BadRecord]:
    try:
        images = [read_image(one, name) for one in (place if isinstance(place, list) else [place])]
    except BadRecord as error:
        return [error]
    sizes = " and ".join(f"{image.width} x {image.height} {image.mode}" for image in images)
    return f"{name}: {sizes}" + (f", {text!r}" if text else "")
