"""Micro-batches for training, exact shares for evaluation; both read by worker processes.

Every worker makes its part of every micro-batch, and this process puts the parts together. So a batch does
not depend on the number of workers, and map-style sets, shards and mixtures of them go the same way. A batch
carries the position behind it; what workers have prefetched beyond it is part of no state.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from blip import dist
from blip.batch import Batch
from blip.data.collate import Tokenize, TokenizeColumns, collate, merge
from blip.data.mixing import Draw, MapDataset, MapSource, Plan, Reader, Share, global_id, mixture_weights
from blip.data.samples import BadRecord
from blip.data.streams.shards import ShardDataset, ShardSource
from blip.data.workers import Failure, PartStream
from blip.errors import BlipError, CheckpointError, ConfigError, DataError

Source = MapSource | ShardSource


class Skips(Protocol):
    """Where good and bad records are counted, as `blip.data.skips.SkipLog` does it."""

    def update(self, bad: Sequence[tuple[str, BadRecord]], good: int, epoch: int) -> None:
        """Told (dataset, record) of what was skipped and the number of good samples, both of an epoch."""
        ...


@dataclass
class LoaderConfig:
    """Sizes and switches of a TrainLoader."""

    batch_size: int
    """Rows per rank and micro-batch."""
    accum: int = 1
    """Micro-batches per optimizer step."""
    seed: int = 42
    """Key of order, mixing and augmentation."""
    num_workers: int = 0
    """Loader processes; 0 reads in this one."""
    drop_last: bool = True
    """Leave out the samples of an epoch that do not fill a step; several sources always do so."""
    whole_steps: bool = False
    """In a mixture, draw the source per optimizer step, for contrastive losses over its micro-batches."""
    sampling: str | None = None
    """How ratios become weights of a mixture, see `mixing.mixture_weights`."""
    pad_id: int = 0
    """Token id that fills `text_ids`, `answer_ids` ... behind a text."""
    pin_memory: bool = False
    """Page-locked batches, for asynchronous copies to a GPU."""
    prefetch: int = 2
    """Micro-batches that each worker is ahead."""
    world: int | None = None
    """Number of ranks; None: of the process group."""
    rank: int | None = None
    """This rank; None: in the process group."""


class TrainLoader:
    """An endless iterator over micro-batches, from a position on.

    A batch has the samples' keys (see `collate`), `text_ids` and `text_mask` of `text_input`, and `rows`,
    int64 (B,), the rows in the global batch of the optimizer step; `batch_total`, rows on all ranks; `epoch`;
    `step`, the optimizer step it belongs to; `micro_batch` and `num_micro_batches` of that step; `source`,
    the name of what it was drawn from; `position`, the state behind it. `image_id` is unique over all
    datasets.

    Args:
        datasets: name -> map-style dataset or ShardDataset. Without ratios map-style ones are concatenated,
            and shards are drawn by batch, in proportion to size. Concatenated datasets must give equal keys
            and image sizes.
        config: sizes and switches.
        ratios: name -> `sample_ratio`; with these, or with `sampling`, every micro-batch comes from one
            dataset, the same on all ranks.
        tokenize: texts -> `text_ids`, `text_mask`, of `text_input` or by column; called in the workers.
        skips: told of the bad records and the number of good ones.

    Raises:
        ConfigError: batches that these datasets cannot fill, or ranks that they cannot be dealt to.
        DataError: an empty dataset, or concatenated ones with different keys or image sizes.
    """

    def __init__(
        self,
        datasets: Mapping[str, MapDataset | ShardDataset],
        config: LoaderConfig,
        ratios: Mapping[str, float | None] | None = None,
        tokenize: Tokenize | TokenizeColumns | None = None,
        skips: Skips | None = None,
    ) -> None:
        self.config = config
        self.wait_s = 0.0
        self._traffic = Traffic(0.0, 0.0, 0)
        self._world = dist.world_size() if config.world is None else config.world
        self._rank = dist.rank() if config.rank is None else config.rank
        self._tokenize, self._skips = tokenize, skips
        global_batch = config.batch_size * self._world
        self._sources, weights = _sources(datasets, ratios or {}, global_batch, self._world, config.sampling)
        self.plan = Plan(
            config.seed,
            global_batch,
            config.accum,
            config.drop_last,
            tuple(None if source.streaming else source.num_samples for source in self._sources),
            tuple(weights),
            sum(source.num_samples for source in self._sources),
            config.whole_steps,
        )
        problems = self.plan.problems([source.name for source in self._sources], self._world)
        if problems:
            raise ConfigError("; ".join(problems))
        for source in self._sources:
            # Ranks would meet different keys, and collectives hang, only after some steps.
            if samples := source.firsts(config.seed):
                collate(samples)
        useful = max(source.useful_workers(config.batch_size) for source in self._sources)
        self._workers = max(1, min(config.num_workers, useful))
        self._layout = {
            "seed": config.seed,
            "global batch": global_batch,
            "accum_grad_iters": config.accum,
            "drop_last": config.drop_last,
            "ranks": self._world,
            "datasets": [source.description for source in self._sources],
        }
        lanes = [source.start() for source in self._sources]
        self._position: dict[str, Any] = {"batches": 0, "counts": [0] * len(self._sources), "lanes": lanes}
        self._stream: PartStream | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; with several sources, of as many samples as they have together."""
        return self.plan.steps_per_epoch

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all micro-batches of an epoch, on all ranks."""
        return min(self.plan.epoch_samples, self.plan.batches_per_epoch * self.plan.global_batch)

    @property
    def num_samples(self) -> int:
        """Samples of all sources together."""
        return self.plan.epoch_samples

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        draw = self._draw()
        chunks = self._next_chunks()
        parts = [chunk.batch for chunk in chunks if chunk.batch is not None]
        batch = merge(parts, self.config.pad_id, self.config.pin_memory)
        self._advance(draw, chunks)
        self._traffic = Traffic(
            *map(sum, zip(self._traffic, *(chunk.traffic for chunk in chunks), strict=True))
        )
        start, end = dist.slices(draw.total, self._world)[self._rank]
        batch |= {
            "rows": torch.arange(start, end) + draw.micro * self.plan.global_batch,
            "batch_total": draw.total,
            "epoch": draw.epoch,
            "step": draw.step,
            "micro_batch": draw.micro,
            "num_micro_batches": draw.num_micro,
            "source": self._sources[draw.source].name,
            "position": self.state_dict(),
        }
        if self._skips is not None:
            bad = [record for chunk in chunks for record in chunk.bad]
            self._skips.update(bad, good=end - start, epoch=draw.epoch)
        self.wait_s += time.perf_counter() - began
        return batch  # type: ignore[return-value]

    def steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step after the other, without end.

        Of a first step that the position is within, the rest.
        """
        while True:
            batches: list[Any] = [next(self)]
            while batches[-1]["micro_batch"] + 1 < batches[-1]["num_micro_batches"]:
                batches.append(next(self))
            yield batches

    def rest_of_epoch(self) -> Iterator[Batch]:
        """The micro-batches from the position to the end of its epoch."""
        epoch = self._draw().epoch
        while self._draw().epoch == epoch:
            yield next(self)

    @property
    def num_workers(self) -> int:
        """Processes that make batches, this one if there are no others."""
        return self._workers

    def take_traffic(self) -> Traffic:
        """What it took to make the batches since this was asked before."""
        taken, self._traffic = self._traffic, Traffic(0.0, 0.0, 0)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch handed out: integers, strings and lists only."""
        return {"layout": self._layout, **self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch that `state` (or a batch's `position`) belongs to.

        Raises:
            CheckpointError: the data, batch size, accumulation, seed or number of ranks is another one.
        """
        before = state.get("layout", {})
        changed = [
            f"{k} is {now}, was {before.get(k)}" for k, now in self._layout.items() if before.get(k) != now
        ]
        if changed:
            raise CheckpointError(
                f"the checkpoint's place in the data belongs to another setup: {'; '.join(changed)}; resume"
                " with the same settings and number of ranks, or start a new run from its weights with"
                " model.init_from"
            )
        self.close()
        self._position = {key: state[key] for key in ("batches", "counts", "lanes")}

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones at the position."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _draw(self) -> Draw:
        return self.plan.draw(self._position["batches"], self._position["counts"])

    def _next_chunks(self) -> list[_Chunk]:
        if self._stream is None:
            self._stream = self._open()
        try:
            return [next(self._stream) for _ in range(self._workers)]
        except BaseException:
            self.close()  # what is under way no longer fits the position
            raise

    def _open(self) -> PartStream:
        parts = _Parts(self._sources, self.plan, self._rank, self._world, self._position, self._tokenize)
        return PartStream(parts, min(self.config.num_workers, self._workers), prefetch=self.config.prefetch)

    def _advance(self, draw: Draw, chunks: list[_Chunk]) -> None:
        """Move the position; its parts are replaced, never changed, since batches hold on to them."""
        counts, lanes = list(self._position["counts"]), list(self._position["lanes"])
        counts[draw.source] += 1
        lanes[draw.source] = [lane for chunk in chunks for lane in chunk.lanes]
        self._position = {"batches": self._position["batches"] + 1, "counts": counts, "lanes": lanes}


def _sources(
    datasets: Mapping[str, MapDataset | ShardDataset],
    ratios: Mapping[str, float | None],
    global_batch: int,
    world: int,
    sampling: str | None = None,
) -> tuple[list[Source], list[float]]:
    """What batches are drawn from, and with which weights."""
    if not datasets:
        raise ConfigError("datasets: there is none to train on; name at least one with a train split")
    empty = [name for name, dataset in datasets.items() if not len(dataset)]
    if empty:
        raise DataError(f"datasets.{empty[0]}: it has no samples; check its path and split")
    sizes = {name: len(dataset) for name, dataset in datasets.items()}
    weights = mixture_weights({name: ratios.get(name) for name in datasets}, sampling, sizes)
    sources: list[Source] = []
    pool: dict[int, MapDataset] = {}
    for number, (name, dataset) in enumerate(datasets.items()):
        if weights is not None and name not in weights:
            continue
        if isinstance(dataset, ShardDataset):
            if len(dataset) < global_batch:
                raise ConfigError(
                    f"run.batch_size_train: {name} has {len(dataset)} samples, fewer than a batch of it"
                    f" ({global_batch} rows on all ranks); lower run.batch_size_train or leave {name} out"
                )
            sources.append(ShardSource(number, dataset, global_batch, world))
        elif weights is not None:
            sources.append(MapSource({number: dataset}))
        else:
            pool[number] = dataset
    if pool:
        sources.insert(0, MapSource(pool))
    if weights is None:
        return sources, [float(source.num_samples) for source in sources]
    return sources, list(weights.values())


class Traffic(NamedTuple):
    """What it took the workers to make batches, added up over them."""

    busy_s: float
    """Seconds of reading, decoding and waiting for shards."""
    fetch_wait_s: float
    """Those of waiting for shards from elsewhere."""
    fetched: int
    """Bytes from elsewhere."""


class _Chunk(NamedTuple):
    """A worker's part of a micro-batch."""

    batch: dict[str, Any] | None
    """None where the worker has no row of it."""
    lanes: list[list[int]]
    """Positions of the worker's lanes of the source."""
    bad: list[tuple[str, BadRecord]]
    """(dataset, record) of what was skipped."""
    traffic: Traffic


class _Parts(IterableDataset):
    """The endless stream of one worker's parts, from a position on."""

    def __init__(
        self,
        sources: Sequence[Source],
        plan: Plan,
        rank: int,
        world: int,
        position: dict[str, Any],
        tokenize: Tokenize | TokenizeColumns | None,
    ) -> None:
        self._sources, self._plan, self._rank, self._world = sources, plan, rank, world
        self._position, self._tokenize = position, tokenize

    def __iter__(self) -> Iterator[_Chunk | Failure]:
        info = get_worker_info()
        share = Share(self._rank, self._world, info.id if info else 0, info.num_workers if info else 1)
        lanes, number, counts = (
            self._position["lanes"],
            self._position["batches"],
            list(self._position["counts"]),
        )
        seed = self._plan.seed
        readers: list[Reader] = [
            s.reader(share, seed, at) for s, at in zip(self._sources, lanes, strict=True)
        ]
        try:
            while True:
                draw = self._plan.draw(number, counts)
                yield self._part(readers[draw.source], draw)
                number += 1
                counts[draw.source] += 1
        except BlipError as error:
            yield Failure(type(error), str(error))

    def _part(self, reader: Reader, draw: Draw) -> _Chunk:
        began = time.perf_counter()
        samples, skipped = [], []
        for number, name, sample, bad in reader.read(draw):
            if "image_id" in sample:
                sample = {**sample, "image_id": global_id(number, sample["image_id"])}
            samples.append(sample)
            skipped += [(name, record) for record in bad]
        batch = collate(samples, self._tokenize) if samples else None
        fetched, waited = reader.take_fetched()
        traffic = Traffic(time.perf_counter() - began, waited, fetched)
        return _Chunk(batch, reader.positions(), skipped, traffic)


class EvalLoader:
    """A dataset to evaluate on, in batches: every sample once, on one rank, none repeated to even out ranks.

    Everything but `batches` is answered by the dataset.

    Args:
        dataset: `len(dataset)` samples `dataset[i]`.
        batch_size: rows per batch.
        num_workers: loader processes.
        tokenize: texts -> `text_ids`, `text_mask` of `text_input`; called in the workers.
        world: number of ranks; None: of the process group.
        rank: this rank; None: in the process group.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        num_workers: int = 0,
        tokenize: Tokenize | TokenizeColumns | None = None,
        world: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.dataset = dataset
        self._batch_size, self._num_workers, self._tokenize = batch_size, num_workers, tokenize
        self._world, self._rank = world, rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def batches(self) -> Iterator[Batch]:
        """This rank's samples in order, `dist.slices(len(self))`, with `index` int64 (B,) their numbers.

        Raises:
            DataError: a sample cannot be read; a score without it would be another one.
        """
        rank = dist.rank() if self._rank is None else self._rank
        start, end = dist.slices(len(self), self._world)[rank]
        indices = [range(at, min(at + self._batch_size, end)) for at in range(start, end, self._batch_size)]
        workers = min(self._num_workers, len(indices))
        yield from PartStream(_EvalParts(self.dataset, self._tokenize), workers, indices)


class _EvalParts(Dataset):
    def __init__(self, dataset: Any, tokenize: Tokenize | TokenizeColumns | None) -> None:
        self._dataset, self._tokenize = dataset, tokenize

    def __getitem__(self, indices: range) -> Any:
        try:
            batch = collate([self._dataset[index] for index in indices], self._tokenize)
        except BlipError as error:
            return Failure(DataError, str(error))
        return {**batch, "index": torch.tensor(list(indices))}
