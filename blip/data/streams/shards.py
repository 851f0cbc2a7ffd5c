"""Webdataset shards as endless lanes with a position of five integers.

Shards are permuted per epoch and dealt to a fixed number of lanes. A lane permutes its samples within
windows, which may span shards, so that no rolling buffer has to be saved.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from blip import dist, keyed
from blip.data.mixing import Draw, Read, Share
from blip.data.samples import BadRecord, SampleMaker
from blip.data.streams.stores import SIZES_FILE, LocalShards, Store, probe_all, reading
from blip.data.streams.tars import IMAGES, Ref, payload, scan_file
from blip.errors import ConfigError, DataError
from blip.together import on_main

log = logging.getLogger(__name__)

_MOST_LOST = 8
"""Remote shards in a row that a lane does without; then it is the network that is down."""


class ShardDataset:
    """Samples of tar shards.

    Args:
        name: of the dataset; keys its randomness.
        shards: the files in a fixed order, or where else they lie.
        maker: record -> sample. The record is what the `.json` member holds, or the `.txt` member as caption.
        lanes: most lanes; see `num_lanes`.
        window: samples of a lane that are permuted among each other.
        image_ids: give each sample `image_id`: a function of the record's, of its `url`, or of its name.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Path] | Store,
        maker: SampleMaker,
        lanes: int = 16,
        window: int = 256,
        image_ids: bool = True,
    ) -> None:
        self.shards: Store = LocalShards(shards) if isinstance(shards, Sequence) else shards
        self.labels = self.shards.labels
        if not self.labels:
            raise DataError(f"datasets.{name}.path: no shards")
        self.name = name
        self.lanes = lanes
        self.window = window
        self.maker = maker
        self.image_ids = image_ids

    def __len__(self) -> int:
        return self.num_samples

    @cached_property
    def num_samples(self) -> int:
        """Number of samples: as told, from `sizes.json` where it is, else counted from the shards' headers.

        Counting ends after some 50,000 samples, in remote shards after the first one that has any; what is
        left is estimated, by file size or by the number of shards. Call it on every rank.

        Raises:
            DataError: remote shards that would have to be counted cannot be read.
        """
        told = self.shards.num_samples
        return told or (on_main(self._count) if self.shards.remote else self._count())

    def _count(self) -> int:
        store = self.shards
        known = store.known_sizes()
        total = sum(size for size in known if size is not None)
        unknown = [i for i, size in enumerate(known) if size is None]
        counted: list[int] = []
        samples = 0
        bad: list[BadRecord] = []
        for i in keyed.permutation(len(unknown), "count").tolist():
            if samples >= store.most_counted:
                break
            if store.remote and len(bad) == 3:
                raise DataError(
                    f"datasets.{self.name}.path: its shards cannot be counted, the last one because of"
                    f" {bad[-1]}; mend that, or give datasets.{self.name}.num_samples"
                )
            counted.append(unknown[i])
            for entry in self.scan(unknown[i]):
                samples += isinstance(entry, Ref)
                bad += [entry] if isinstance(entry, BadRecord) and not samples else []
        if len(counted) == len(unknown):
            return total + samples
        every, seen = (sum(store.weight(i) for i in some) for some in (unknown, counted))
        estimate = total + round(samples * every / seen)
        log.warning(
            "datasets.%s: about %d samples, estimated from %d of %d shards; %s beside them (name -> number of"
            " samples) would tell exactly, or datasets.%s.num_samples",
            *(self.name, estimate, len(counted), len(unknown), SIZES_FILE, self.name),
        )
        return estimate

    def scan(self, shard: int) -> Iterator[Ref | BadRecord]:
        """The samples of a shard in stored order; a BadRecord where it cannot be read (any further)."""
        label = self.labels[shard]
        try:
            file = self.shards.open(shard)
        except OSError as error:
            yield BadRecord("unreadable_shard", label, str(error))
            return
        with file:
            yield from scan_file(file, shard, label)

    def stored(self, shard: int, ahead: bool = True) -> Iterator[tuple[IO[bytes], Ref] | BadRecord]:
        """As `scan`, with the opened shard; with `ahead` the next one is fetched meanwhile."""
        try:
            with reading(self.shards, shard, ahead) as file:
                for entry in scan_file(file, shard, self.labels[shard]):
                    yield entry if isinstance(entry, BadRecord) else (file, entry)
        except OSError as error:
            yield BadRecord("unreadable_shard", self.labels[shard], str(error))

    def damaged(self) -> list[BadRecord]:
        """The shards that are cut off or no tar files at all, in order; called on every rank, each looks at
        its part of them. Of remote ones some are looked at, and their beginning only."""
        chosen = self.shards.probed()
        start, end = dist.slices(len(chosen))[dist.rank()]
        return dist.gather_lists(probe_all(self.shards, chosen[start:end]))

    @property
    def num_probed(self) -> int:
        """How many of them `damaged` looks at."""
        return len(self.shards.probed())

    def sample(self, ref: Ref, file: IO[bytes], epoch: int, seed: int) -> dict[str, Any]:
        """The sample at `ref`, read from its opened shard; `epoch` and `seed` key its augmentation.

        Raises:
            BadRecord: missing member, unreadable text or picture.
        """
        name = f"{self.labels[ref.shard]}/{ref.key}"
        if not ref.files:
            raise BadRecord(
                "missing_image", name, "a key ends at the first dot of a name; rename its members"
            )
        rng = keyed.generator(seed, "augment", self.name, epoch, name)
        record = self._record(ref, file, name, rng)
        extension = next((e for e in IMAGES if e in ref.files), None)
        if extension is None:
            raise BadRecord("missing_image", name)
        sample: dict[str, Any] = {**self.maker(record, payload(file, ref.files[extension], name), name, rng)}
        if self.image_ids:
            picture = record.get(self.maker.columns.get("image_id", "image_id"), record.get("url", name))
            known = isinstance(picture, int) and picture >= 0
            sample["image_id"] = picture if known else keyed.key("image_id", str(picture)) >> 16
        return sample

    def stored_record(self, ref: Ref, file: IO[bytes], name: str) -> Any:
        """What the `.json` member of a sample holds, else the `.txt` member as caption; None: neither.

        Raises:
            BadRecord: it cannot be read.
        """
        try:
            if "json" in ref.files:
                return json.loads(payload(file, ref.files["json"], name))
            if "txt" in ref.files:
                # A byte that is not UTF-8 makes it bad_text, as in annotation files.
                text = payload(file, ref.files["txt"], name)
                caption = text.decode("utf-8-sig", errors="surrogateescape").strip()
                return {self.maker.columns.get("caption", "caption"): caption}
        except (ValueError, RecursionError) as error:
            raise BadRecord("malformed_record", name, str(error)) from error
        return None

    def _record(self, ref: Ref, file: IO[bytes], name: str, rng: np.random.Generator) -> dict[str, Any]:
        record = self.stored_record(ref, file, name)
        if isinstance(record, list) and record:
            # LAVIS's ranked captions: one of the best two, drawn anew in each epoch.
            record = record[int(rng.integers(min(2, len(record))))]
        if isinstance(record, str):
            record = {self.maker.columns.get("caption", "caption"): record}
        if not isinstance(record, dict):
            raise BadRecord("no_caption" if record is None else "malformed_record", name)
        return record


class Lane:
    """An endless stream over its share of the shards, epoch after epoch.

    Args:
        dataset: the shards.
        seed: of the run.
        lane: number of this lane.
        lanes: number of lanes.
        position: where to go on, as `position` told; zeros = at the beginning.
    """

    def __init__(
        self, dataset: ShardDataset, seed: int, lane: int, lanes: int, position: Sequence[int]
    ) -> None:
        self._dataset, self._seed, self._lane, self._lanes = dataset, seed, lane, lanes
        self._epoch, self._window, self._shard, self._sample, self._done = position
        self._resume = (self._shard, self._sample)
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._refs: list[Ref] | None = None
        self._lost = 0
        self._order = np.empty(0, np.int64)
        # A pass that was joined midway may have had its good samples before.
        self._good = any(position)
        self._entries = self._scan()
        dataset.shards.prefetch(self._shards(self._epoch)[self._shard])

    @property
    def position(self) -> list[int]:
        """[lane's epoch, window, shard and sample where the window starts, samples taken from the window].

        Shards count from 0 in the lane's order of the epoch, samples in the shard's stored order.
        """
        return [self._epoch, self._window, self._shard, self._sample, self._done]

    def next(self) -> tuple[dict[str, Any], list[BadRecord]]:
        """The next good sample, and the bad records skipped on the way.

        Raises:
            DataError: a whole pass over the lane's shards has no good sample, or the position does not fit
            the shards.
        """
        bad: list[BadRecord] = []
        while True:
            refs = self._refs
            if refs is None:
                refs = self._fill(bad)
            if self._done == len(refs):
                self._advance(last=len(refs) < self._dataset.window, bad=bad)
                continue
            ref = refs[self._order[self._done]]
            self._done += 1
            try:
                sample = self._dataset.sample(ref, self._file(ref.shard), self._epoch, self._seed)
            except BadRecord as error:
                bad.append(error)
                continue
            self._good = True
            return sample, bad

    def _shards(self, epoch: int) -> list[int]:
        order = keyed.permutation(len(self._dataset.labels), self._seed, "shards", epoch, self._dataset.name)
        return order[self._lane :: self._lanes].tolist()

    def _scan(self) -> Iterator[tuple[tuple[int, int], Ref | BadRecord]]:
        """What the rest of the epoch holds, from `_resume` on, each with the place behind it."""
        start, skip = self._resume
        order = self._shards(self._epoch)
        for number, shard in enumerate(order):
            if number < start:
                continue
            last = number + 1 == len(order)
            self._dataset.shards.prefetch(self._shards(self._epoch + 1)[0] if last else order[number + 1])
            count = 0
            for entry in self._dataset.scan(shard):
                count += isinstance(entry, Ref)
                if number > start or count > skip or not isinstance(entry, Ref):
                    yield (number, count), entry
                if count == 0:
                    self._count_lost(entry)
            if count:
                self._lost = 0

    def _count_lost(self, entry: Ref | BadRecord) -> None:
        """Raise where remote shards cannot be had, one after the other."""
        if not isinstance(entry, BadRecord) or not self._dataset.shards.remote:
            return
        self._lost += 1
        if self._lost == _MOST_LOST:
            raise DataError(
                f"datasets.{self._dataset.name}.path: {self._lost} shards in a row cannot be read, the last"
                f" is {entry}; see whether they can be reached, then go on with run.resume=auto"
            )

    def _fill(self, bad: list[BadRecord]) -> list[Ref]:
        refs: list[Ref] = []
        for place, entry in self._entries:
            self._resume = place
            if isinstance(entry, Ref):
                refs.append(entry)
                if len(refs) == self._dataset.window:
                    break
            elif self._done == 0:  # otherwise it was told before the run was interrupted
                bad.append(entry)
        if self._done > len(refs):
            raise DataError(
                f"datasets.{self._dataset.name}: its shards hold other samples than when the checkpoint was"
                " written; put the same files back, or start a new run from its weights with model.init_from"
            )
        key = (self._seed, "window", self._dataset.name, self._epoch, self._lane, self._window)
        self._refs, self._order = refs, keyed.permutation(len(refs), *key)
        self._keep({ref.shard for ref in refs})
        return refs

    def _keep(self, shards: set[int]) -> None:
        """Let go of the shards that the window does not need, and hold on to fetched ones that it does."""
        for shard in self._files.keys() - shards:
            self._files.pop(shard).close()
        for shard in sorted(shards) if self._dataset.shards.remote else ():
            with suppress(BadRecord):  # it is told of when its samples are read
                self._file(shard)

    def _advance(self, last: bool, bad: list[BadRecord]) -> None:
        self._refs, self._done = None, 0
        if not last:
            self._window += 1
            self._shard, self._sample = self._resume
            return
        if not self._good:
            names = [self._dataset.labels[shard] for shard in self._shards(self._epoch)]
            causes = sorted({error.cause for error in bad}) or ["no sample in them"]
            raise DataError(
                f"datasets.{self._dataset.name}: no readable sample in {len(names)} shard(s) ({names[0]},"
                f" ...; {', '.join(causes)}); see 'blip data check', or leave them out of the path"
            )
        self._good = False
        self._epoch, self._window, self._shard, self._sample = self._epoch + 1, 0, 0, 0
        self._resume = (0, 0)
        self._entries = self._scan()

    def _file(self, shard: int) -> IO[bytes]:
        """The opened shard; a window may span several, so a few stay open."""
        file = self._files.pop(shard, None)
        if file is None:
            if len(self._files) == 4:
                self._files.popitem(last=False)[1].close()
            try:
                file = self._dataset.shards.open(shard)
            except OSError as error:
                raise BadRecord("unreadable_shard", self._dataset.labels[shard], str(error)) from error
        self._files[shard] = file
        return file


class ShardSource:
    """The lanes of a dataset, dealt to ranks and workers; each reads its rows of a batch from its lanes.

    Args:
        number: of the dataset in the configuration.
        dataset: the shards.
        global_batch: G, rows of a micro-batch on all ranks.
        world: number of ranks.

    Raises:
        ConfigError: the lanes cannot be dealt evenly to the ranks.
    """

    streaming = True

    def __init__(self, number: int, dataset: ShardDataset, global_batch: int, world: int) -> None:
        self.name = dataset.name
        self.number = number
        self.dataset = dataset
        self.num_lanes = num_lanes(dataset, global_batch, world)
        self.rows_per_lane = global_batch // self.num_lanes
        self._lanes_per_rank = self.num_lanes // world

    @property
    def num_samples(self) -> int:
        """Samples of one pass."""
        return self.dataset.num_samples

    @property
    def description(self) -> str:
        """What a position is relative to."""
        content = keyed.key(*self.dataset.labels) % 10**6
        return (
            f"{self.name} ({len(self.dataset.labels)} shards no. {content}, {self.num_lanes} lanes,"
            f" window {self.dataset.window})"
        )

    def useful_workers(self, batch_size: int) -> int:
        """More workers than this would have no lane."""
        return self._lanes_per_rank

    def start(self) -> list[list[int]]:
        """Positions of a rank's lanes at the beginning."""
        return [[0] * 5 for _ in range(self._lanes_per_rank)]

    def firsts(self, seed: int) -> list[dict[str, Any]]:
        """Nothing to compare: its samples share no batch with another dataset's."""
        return []

    def reader(self, share: Share, seed: int, positions: list[list[int]]) -> ShardReader:
        """Access for one worker; `positions` of all lanes of its rank."""
        return ShardReader(self, share, seed, positions)


class ShardReader:
    """One worker's lanes: contiguous, in rank and worker order, as the rows of a batch are."""

    def __init__(self, source: ShardSource, share: Share, seed: int, positions: list[list[int]]) -> None:
        self._source = source
        first, _ = dist.slices(source.num_lanes, share.world)[share.rank]
        self._lanes = [
            Lane(source.dataset, seed, lane, source.num_lanes, positions[lane - first])
            for lane in share.of(source.num_lanes)
        ]

    def read(self, draw: Draw) -> list[Read]:
        """This worker's rows of the micro-batch: equally many from each of its lanes."""
        source = self._source
        return [
            Read(source.number, source.name, *lane.next())
            for lane in self._lanes
            for _ in range(source.rows_per_lane)
        ]

    def positions(self) -> list[list[int]]:
        """Where the lanes stand."""
        return [lane.position for lane in self._lanes]

    def take_fetched(self) -> tuple[int, float]:
        """Bytes of remote shards and seconds waited for them since this was asked before."""
        return self._source.dataset.shards.take_fetched()


def num_lanes(dataset: ShardDataset, global_batch: int, world: int) -> int:
    """The largest divisor of `dataset.lanes` that divides the batch and is no more than the shards.

    It does not depend on `world`, so neither does any batch.

    Raises:
        ConfigError: fewer shards than ranks, or lanes that cannot be dealt evenly to `world` ranks.
    """
    shards = len(dataset.labels)
    divisors = [n for n in range(1, dataset.lanes + 1) if dataset.lanes % n == 0 and global_batch % n == 0]
    lanes = max(n for n in divisors if n <= shards)
    if lanes % world == 0:
        return lanes
    if shards < world:
        raise ConfigError(
            f"datasets.{dataset.name}.path: {shards} shard(s) cannot feed {world} ranks; split the data into"
            f" at least {world} shards, or use fewer ranks"
        )
    valid = [n for n in range(world, min(shards, global_batch) + 1, world) if global_batch % n == 0]
    raise ConfigError(
        f"datasets.{dataset.name}.lanes: {dataset.lanes} gives {lanes} lanes for {shards} shards and batches"
        f" of {global_batch}, which cannot be dealt evenly to {world} ranks; use"
        f" {' or '.join(map(str, valid[-3:]))}"
    )
