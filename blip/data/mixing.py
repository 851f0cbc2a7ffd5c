"""Which samples each micro-batch of a run holds: epochs, order and mixing, as functions of (seed, number).

Nothing here depends on the number of ranks or workers, and nothing is drawn in sequence: the position of a
run is the number of micro-batches so far and, in a mixture, how many of them came from each source.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from blip import dist, keyed
from blip.data.samples import BadRecord
from blip.errors import ConfigError

_ID_BITS = 48
_SHARES: dict[str, Callable[[int], float]] = {
    "proportional": float,
    "sqrt": math.sqrt,
    "uniform": lambda size: 1.0,
}
"""Way of sampling -> weight of a dataset by its size."""


class MapDataset(Protocol):
    """Samples by number. A record that cannot be read is replaced, by a choice keyed on the same numbers."""

    name: str

    def __len__(self) -> int: ...

    def sample_or_substitute(self, index: int, epoch: int, seed: int) -> tuple[Any, list[BadRecord]]:
        """The sample (its substitute, if unreadable), and the bad records met on the way."""
        ...


class Share(NamedTuple):
    """Who reads: one of `workers` processes of one of `world` ranks."""

    rank: int
    world: int
    worker: int
    workers: int

    def of(self, total: int) -> range:
        """This worker's rows of a global batch of `total` rows; contiguous, in rank and worker order."""
        start, end = dist.slices(total, self.world)[self.rank]
        first, last = dist.slices(end - start, self.workers)[self.worker]
        return range(start + first, start + last)


class Read(NamedTuple):
    """One row as read: number and name of its dataset, the sample, and what was skipped to get it."""

    number: int
    name: str
    sample: Any
    bad: list[BadRecord]


class Draw(NamedTuple):
    """What one global micro-batch is made of."""

    epoch: int
    step: int
    """Optimizer step, from 0 at the start of the run."""
    micro: int
    """Number within the step."""
    num_micro: int
    """Micro-batches of the step; fewer than usual at the end of an epoch that is not cut."""
    source: int
    source_epoch: int
    """Pass over the source (0 for a stream, whose lanes count their own)."""
    start: int
    """First position in the order of that pass."""
    total: int
    """Rows on all ranks."""


class Reader(Protocol):
    """What one worker has open of a source."""

    def read(self, draw: Draw) -> list[Read]:
        """The worker's rows of a micro-batch that is drawn from this source."""
        ...

    def positions(self) -> list[list[int]]:
        """Where the worker's lanes stand; empty for a source without any."""
        ...

    def take_fetched(self) -> tuple[int, float]:
        """Bytes fetched from elsewhere and seconds waited for them since this was asked before."""
        ...


class MapSource:
    """One or several map-style datasets as one: an order over their concatenation.

    Args:
        datasets: number in the configuration -> dataset.
    """

    streaming = False

    def __init__(self, datasets: Mapping[int, MapDataset]) -> None:
        self.name = "+".join(dataset.name for dataset in datasets.values())
        self.numbers = list(datasets)
        self.datasets = list(datasets.values())
        self.ends = list(itertools.accumulate(len(dataset) for dataset in self.datasets))
        self.num_samples = self.ends[-1]

    @property
    def description(self) -> str:
        """What a position is relative to."""
        return f"{self.name} ({self.num_samples} samples)"

    def useful_workers(self, batch_size: int) -> int:
        """More workers than this would have no row of a batch."""
        return batch_size

    def start(self) -> list[list[int]]:
        """Lane positions at the beginning: there are no lanes."""
        return []

    def firsts(self, seed: int) -> list[dict[str, Any]]:
        """The first sample of every dataset, to see whether they can share a batch."""
        return [dataset.sample_or_substitute(0, 0, seed)[0] for dataset in self.datasets[:64]]

    def locate(self, index: int) -> tuple[int, int]:
        """(which of the datasets, index within it) of a number of the concatenation."""
        which = bisect_right(self.ends, index)
        return which, index - (self.ends[which - 1] if which else 0)

    def reader(self, share: Share, seed: int, positions: list[list[int]]) -> MapReader:
        """Access for one worker."""
        return MapReader(self, share, seed)


class MapReader:
    """One worker's access to a MapSource; holds the order of one pass."""

    def __init__(self, source: MapSource, share: Share, seed: int) -> None:
        self._source, self._share, self._seed = source, share, seed
        self._epoch = -1
        self._order = np.empty(0, np.int32)

    def read(self, draw: Draw) -> list[Read]:
        """This worker's rows of the micro-batch."""
        if self._epoch != draw.source_epoch:
            self._epoch = draw.source_epoch
            self._order = _order(self._source.num_samples, self._seed, self._epoch, self._source.name)
        return [self._row(draw.start + row) for row in self._share.of(draw.total)]

    def positions(self) -> list[list[int]]:
        """None: the plan says it all."""
        return []

    def take_fetched(self) -> tuple[int, float]:
        """Nothing is fetched."""
        return 0, 0.0

    def _row(self, place: int) -> Read:
        source = self._source
        which, index = source.locate(int(self._order[place]))
        dataset = source.datasets[which]
        return Read(
            source.numbers[which],
            dataset.name,
            *dataset.sample_or_substitute(index, self._epoch, self._seed),
        )


def _order(size: int, seed: int, epoch: int, name: str) -> np.ndarray:
    """The order of a pass; int32 where that is enough, since every worker holds one."""
    kind = np.int32 if size <= np.iinfo(np.int32).max else np.int64
    return keyed.permutation(size, seed, "order", epoch, name).astype(kind)


@dataclass(frozen=True)
class Plan:
    """What every micro-batch holds, as a function of its number.

    One map-style source: step t of an epoch has the positions [t*A*G, (t+1)*A*G) of the epoch's order (A
    micro-batches of G rows). `drop_last` leaves out what does not fill a step; otherwise the last step has
    fewer micro-batches, and its last one fewer rows.

    Several sources, or a stream: every micro-batch is full and comes from one source. The source of draw
    number n is a function of (seed, n), with probabilities proportional to `weights`; its k-th batch is the
    (k mod b)-th of its pass k // b, where b full batches make a pass.
    """

    seed: int
    global_batch: int
    """G, rows of a micro-batch on all ranks."""
    accum: int
    """A, micro-batches per optimizer step."""
    drop_last: bool
    sizes: tuple[int | None, ...]
    """Samples of each source; None for a stream."""
    weights: tuple[float, ...]
    epoch_samples: int
    whole_steps: bool = False
    """Draw a source per optimizer step, so that a contrastive batch over its micro-batches has one source."""

    @property
    def simple(self) -> bool:
        """Whether there is a single map-style source, whose passes are the epochs."""
        return len(self.sizes) == 1 and self.sizes[0] is not None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        rows = self.accum * self.global_batch
        if self.simple and not self.drop_last:
            return -(-self.epoch_samples // rows)
        return max(1, self.epoch_samples // rows)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches per epoch."""
        if self.simple and not self.drop_last:
            return -(-self.epoch_samples // self.global_batch)
        return self.steps_per_epoch * self.accum

    def draw(self, number: int, counts: Sequence[int]) -> Draw:
        """Micro-batch `number` of the run, after `counts` micro-batches of each source."""
        epoch, within = divmod(number, self.batches_per_epoch)
        step, micro = divmod(within, self.accum)
        num_micro = min(self.accum, self.batches_per_epoch - step * self.accum)
        step += epoch * self.steps_per_epoch
        start = within * self.global_batch
        if self.simple:
            total = min(self.global_batch, self.epoch_samples - start)
            return Draw(epoch, step, micro, num_micro, 0, epoch, start, total)
        source = self._source(step if self.whole_steps else number)
        source_epoch, start = self._pass(source, counts[source])
        return Draw(epoch, step, micro, num_micro, source, source_epoch, start, self.global_batch)

    def _source(self, number: int) -> int:
        if len(self.weights) == 1:
            return 0
        bounds = np.cumsum(self.weights)
        point = keyed.generator(self.seed, "mix", number).random() * bounds[-1]
        return min(int(np.searchsorted(bounds, point, side="right")), len(bounds) - 1)

    def _pass(self, source: int, count: int) -> tuple[int, int]:
        size = self.sizes[source]
        if size is None:
            return 0, 0
        unit = self.accum if self.whole_steps else 1
        batches = size // (unit * self.global_batch) * unit
        epoch, within = divmod(count, batches)
        return epoch, within * self.global_batch

    def problems(self, names: Sequence[str], world: int) -> list[str]:
        """Why these sources cannot fill these batches; empty if they can."""
        rows = self.global_batch * self.accum
        text = f"{self.global_batch} rows on {world} rank(s)" + (f" x {self.accum}" if self.accum > 1 else "")
        if self.simple:
            rest = self.epoch_samples % self.global_batch
            if self.drop_last and self.epoch_samples < rows:
                return [
                    f"run.batch_size_train: {names[0]} has {self.epoch_samples} samples, fewer than one step"
                    f" takes ({text}); lower batch_size_train or accum_grad_iters, or set run.drop_last=false"
                ]
            if not self.drop_last and 0 < rest < world:
                return [
                    f"run.drop_last: the last batch of an epoch of {names[0]} has {rest} row(s), too few for"
                    f" {world} ranks; change run.batch_size_train or set run.drop_last=true"
                ]
            return []
        unit = rows if self.whole_steps else self.global_batch
        return [
            f"run.batch_size_train: {name} has {size} samples, fewer than a batch of it ({unit} rows on all"
            f" ranks); lower run.batch_size_train or leave {name} out"
            for name, size in zip(names, self.sizes, strict=True)
            if size is not None and size < unit
        ]


def mixture_weights(
    ratios: Mapping[str, float | None], sampling: str | None = None, sizes: Mapping[str, int] | None = None
) -> dict[str, float] | None:
    """Weights of the datasets of a mixture; None when no ratio is given, and no way of sampling.

    Datasets without any ratio are not mixed by batch: map-style ones are concatenated.

    Args:
        ratios: name -> `sample_ratio`: the weight itself, or with `sampling` a factor on the weight.
        sampling: `proportional` to the size, `sqrt`: to its square root (InstructBLIP, section 2.4), or
            `uniform`; datasets without a ratio then have the factor 1. None: LAVIS's explicit ratios.
        sizes: samples of each dataset, for `sampling`.

    Raises:
        ConfigError: some datasets have a ratio and some do not, or all ratios are 0.
    """
    if sampling is not None:
        shares = {name: _SHARES[sampling]((sizes or {})[name]) for name in ratios}
        return _some({n: shares[n] * (1.0 if ratio is None else ratio) for n, ratio in ratios.items()})
    given = [name for name, ratio in ratios.items() if ratio is not None]
    if not given:
        return None
    if len(given) < len(ratios):
        missing = [name for name in ratios if name not in given]
        raise ConfigError(
            f"datasets.{missing[0]}.sample_ratio: not given, but given for {', '.join(given)}; give every"
            " dataset a sample_ratio (their numbers of samples keep the proportions of the data), or none"
        )
    return _some({name: float(ratio) for name, ratio in ratios.items() if ratio is not None})


def _some(weights: Mapping[str, float]) -> dict[str, float]:
    found = {name: weight for name, weight in weights.items() if weight}
    if not found:
        raise ConfigError(
            f"datasets: sample_ratio is 0 for {', '.join(weights)}; give at least one a ratio above 0"
        )
    return found


def global_id(dataset: int, image_id: int) -> int:
    """A picture's number that no other dataset of the run uses; the same as `image_id` in the first one.

    The dataset's number stands above 48 bits of `image_id`; a larger or negative one is hashed into them.
    """
    if not 0 <= image_id < 1 << _ID_BITS:
        image_id = keyed.key("image_id", image_id) >> (64 - _ID_BITS)
    return dataset << _ID_BITS | image_id
