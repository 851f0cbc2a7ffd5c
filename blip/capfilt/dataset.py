"""The dataset of a round: made as a draft that a killed process goes on with, then put in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from blip.atomic import PARTIAL, write_text
from blip.capfilt.output import Made, Provenance, in_shards, write_records, write_shard, write_sizes
from blip.capfilt.select import Thresholds, choose
from blip.capfilt.sharing import Claims
from blip.capfilt.units import RecordPool
from blip.capfilt.work import Pool, Work
from blip.errors import DataError
from blip.tasks.capfilt import KeepConfig
from blip.together import on_main

SETTINGS_FILE = "settings.json"
"""What a dataset was made with; nothing in it tells where."""
MADE_FILE = "made.json"
"""What it consists of, beside it."""


class Dataset:
    """What is kept, in `dataset` of the round's folder.

    Args:
        folder: of the round.
        keep: the rules.
        told: provenance of its texts.
        least: thresholds that follow from the rules.
        stopping: whether a signal asks to stop.
    """

    def __init__(
        self,
        folder: Path,
        keep: KeepConfig,
        told: Provenance,
        least: Thresholds,
        stopping: Callable[[], bool],
    ) -> None:
        self.place, self._folder, self._stopping = folder / "dataset", folder, stopping
        self._draft = folder / f"{PARTIAL}dataset"
        self._told = told
        self._choose = partial(choose, keep=keep, least=least)
        self._stamp: dict[str, Any] = {
            "round": told.round,
            "captioner": told.captioner,
            "filter": told.filter,
            "keep": asdict(keep),
            "thresholds": least,
        }

    def write(self, work: Sequence[Work], pools: Sequence[Pool], meet: Callable[[], None]) -> dict[str, Made]:
        """Write it, unless it is there; called on every rank.

        Args:
            work: all units, done.
            pools: that they are of.
            meet: ends this on all ranks where one is asked to stop.

        Returns:
            What was made of each dataset.

        Raises:
            DataError: nothing is kept at all.
        """
        if on_main(lambda: self._stands(work)):
            found = json.loads((self._folder / MADE_FILE).read_bytes())
            return {name: Made(*values) for name, values in found.items()}
        with Claims(self._draft) as claims:
            for one in work:
                if self._stopping():
                    break
                if in_shards(one.pool) and not self._count(one).is_file() and claims.take(one.name):
                    place = self._draft / one.pool.name
                    place.mkdir(parents=True, exist_ok=True)
                    samples = write_shard(one.unit, one.journal, place, self._choose, self._told)
                    write_text(self._count(one), f"{samples}\n")
            meet()
        return on_main(lambda: self._assemble(work, pools))

    def _count(self, one: Work) -> Path:
        """Says of a finished shard how many samples it has."""
        return self._draft / f"{one.name}.count"

    def _stands(self, work: Sequence[Work]) -> bool:
        """Whether the dataset is there; else its draft is begun, or gone on with if it is of the same."""
        lost = [one.name for one in work if one.journal.lost]
        stamp = self._stamp | ({"lost": lost} if lost else {})
        place, begun = self.place / SETTINGS_FILE, self._draft / SETTINGS_FILE
        made = self._folder / MADE_FILE
        if place.is_file() and made.is_file() and json.loads(place.read_bytes()) == stamp:
            return True
        for leftover in self._draft.rglob(f"{PARTIAL}*.*"):  # of a process that was killed
            leftover.unlink()
        if not (begun.is_file() and json.loads(begun.read_bytes()) == stamp):
            shutil.rmtree(self._draft, ignore_errors=True)
            self._draft.mkdir(parents=True)
            write_text(begun, json.dumps(stamp, indent=1) + "\n")
        return False

    def _assemble(self, work: Sequence[Work], pools: Sequence[Pool]) -> dict[str, Made]:
        """Annotation files, sizes of shards, and the whole into its place."""
        made: dict[str, Made] = {}
        for pool in pools:
            own = [one for one in work if one.pool is pool]
            if in_shards(pool):
                counts = {f"{one.unit.file}.tar": int(self._count(one).read_text()) for one in own}
                counts = {file: count for file, count in counts.items() if count}
                write_sizes(self._draft / pool.name, counts)
                made[pool.name] = Made([pool.name], [], sum(counts.values()))
            elif isinstance(pool, RecordPool):
                place = self._draft / pool.name
                made[pool.name] = write_records(
                    pool, [o.journal for o in own], place, self._choose, self._told
                )
        if not any(one.texts for one in made.values()):
            raise DataError(
                f"run.keep: nothing is kept of any text; see the scores in '{self._folder}/scored', and go on"
                " with other thresholds and run.resume=auto"
            )
        write_text(
            self._folder / MADE_FILE,
            json.dumps({name: list(one) for name, one in made.items()}, indent=1) + "\n",
        )
        for counted in self._draft.glob("*.count"):
            counted.unlink()
        shutil.rmtree(self.place, ignore_errors=True)
        self._draft.rename(self.place)
        return made
