"""What there is to do: the units of all web datasets, and where is written what is found about each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blip.capfilt.journal import Journal
from blip.capfilt.next_recipe import passed_on
from blip.capfilt.units import RecordPool, RecordUnit, ShardPool, ShardUnit, open_pool
from blip.config.load import load_config
from blip.config.schema import Config
from blip.data.locate import available_splits, require_files
from blip.errors import ConfigError, hint
from blip.together import on_all

Pool = RecordPool | ShardPool


class Work(NamedTuple):
    """A unit, and where what is found about it is written down."""

    pool: Pool
    unit: RecordUnit | ShardUnit
    journal: Journal

    @property
    def name(self) -> str:
        """Dataset and unit, as a file name."""
        return f"{self.pool.name}-{self.unit.label}"


def open_pools(config: Config, web: Mapping[str, Sequence[str]]) -> list[Pool]:
    """The web datasets as units of work, called NAME, or NAME-SPLIT where one has several splits.

    Call it on every rank.

    Args:
        config: of CapFilt.
        web: as `web_sets` finds them.
    """
    run, found = config.run, []
    for name, splits in web.items():
        for split in splits:
            called = called_as(name, split, splits)
            section = config.datasets[name]
            found.append(
                on_all(partial(open_pool, name, section, split, run.part_size, run.data_root, called))
            )
    return found


def work_of(pools: Sequence[Pool], folder: Path) -> list[Work]:
    """All units, with their journals in a folder per dataset."""
    return [
        Work(pool, unit, Journal(folder / pool.name / f"{unit.label}.jsonl"))
        for pool in pools
        for unit in pool.units()
    ]


def lines_of(work: Sequence[Work]) -> Iterator[dict[str, Any]]:
    """What was found, unit after unit."""
    for one in work:
        yield from one.journal.lines()


def web_sets(config: Config) -> dict[str, list[str]]:
    """The datasets that are cleaned, each with those of its splits that are to be trained on.

    Raises:
        ConfigError: there is none, or `run.human` names none.
    """
    run = config.run
    for name in run.human:
        if name not in config.datasets:
            raise ConfigError(f"run.human: no dataset {name!r}{hint(name, config.datasets)}")
    web = {
        name: [s for s in run.train_splits if s in available_splits(name, section, run.data_root)]
        for name, section in config.datasets.items()
        if name not in run.human
    }
    if not web:
        raise ConfigError("datasets: there is none whose texts are not human, so nothing to clean; name one")
    if without := [name for name, splits in web.items() if not splits]:
        raise ConfigError(
            f"run.train_splits: datasets.{without[0]} has none of {', '.join(run.train_splits)}; name one"
        )
    called = Counter(called_as(name, split, splits) for name, splits in web.items() for split in splits)
    if twice := [name for name, count in called.items() if count > 1]:
        raise ConfigError(f"datasets.{twice[0]}: a split of another dataset is called so, too; rename it")
    return web


def called_as(name: str, split: str, splits: Sequence[str]) -> str:
    """What a split of a dataset is called: NAME, or NAME-SPLIT where it has several."""
    return name if len(splits) == 1 else f"{name}-{split}"


def check(config: Config, web: Mapping[str, Sequence[str]]) -> None:
    """Raise where files or recipes are missing, before anything is trained.

    Args:
        config: of CapFilt.
        web: as `web_sets` finds them.
    """
    run = config.run
    require_files([(n, config.datasets[n], s) for n, splits in web.items() for s in splits], run.data_root)
    wanted = [run.captioner] * bool(run.captions.num) + [run.filter] * run.keep.needs_scores
    for expert in [*wanted, run.pretrain]:
        if expert.tuned_by is None:
            continue
        recipe = load_config(expert.tuned_by, [*expert.options, *passed_on(run)])
        if expert is run.pretrain and run.rounds == 1:
            continue  # it is only written down
        root = recipe.run.data_root
        needed = [
            (name, section, split)
            for name, section in recipe.datasets.items()
            for split in recipe.run.train_splits
            if split in available_splits(name, section, root)
        ]
        require_files(needed, root)
