"""What was skipped: counted by cause, listed in the run folder, and too much of it ends the run."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip import dist
from blip.data.samples import BadRecord
from blip.errors import DataError

SKIPPED_FILE = "skipped.jsonl"
"""In the run folder; other ranks than the first have a number in the name."""
Counts = dict[str, Counter[str]]
"""Dataset -> cause -> number of records."""


class SkipLog:
    """Counts what was skipped, lists it in the run folder, and stops a run that skips too much.

    Each rank counts its own reads; `judge` adds them up, so that all ranks stop together. It is the share
    of an epoch that counts. Before an epoch is over, a run is stopped where the share will be exceeded
    anyway, or is now by more than chance explains.

    Args:
        folder: run folder; each distinct record is listed once in `skipped.jsonl` there (`skipped-N.jsonl` by
            rank N > 0), also over several runs in it. None lists nothing.
        max_bad_ratio: share of reads that may fail.
        min_reads: reads before the share of an unfinished epoch is judged.
    """

    def __init__(self, folder: Path | None = None, max_bad_ratio: float = 0.05, min_reads: int = 200) -> None:
        rank = dist.rank()
        self.path = folder / (f"skipped-{rank}.jsonl" if rank else SKIPPED_FILE) if folder else None
        self.max_bad_ratio = max_bad_ratio
        self.min_reads = min_reads
        self.epoch_rows: int | None = None
        """Rows of an epoch on all ranks, where that is known."""
        self.good = 0
        self.counts: Counts = {}
        self._epochs: dict[int, tuple[int, Counts]] = {}
        """Of the epochs that have not been judged to their end: good reads, and what was skipped."""
        self._listed: set[tuple[str, str, str]] = set()
        if self.path and self.path.is_file():
            lines = self.path.read_text().splitlines()
            self._listed = {_listing(line) for line in lines if line.endswith("}")}  # the last may be half

    @property
    def total(self) -> int:
        """Bad records so far."""
        return _total(self.counts)

    def update(self, bad: Sequence[tuple[str, BadRecord]], good: int = 0, epoch: int = 0) -> None:
        """Count good samples, and count and list bad records.

        Args:
            bad: (dataset, BadRecord) of each.
            good: number of samples that could be read.
            epoch: that they were read for.
        """
        self.good += good
        before, counts = self._epochs.get(epoch, (0, {}))
        self._epochs[epoch] = (before + good, counts)
        for dataset, error in bad:
            for table in (self.counts, counts):
                table.setdefault(dataset, Counter())[error.cause] += 1
        self._list(bad)

    def judge(self) -> None:
        """Called on every rank, from time to time.

        Raises:
            DataError: too large a share could not be read.
        """
        epochs: dict[int, tuple[int, Counts]] = {}
        for part in dist.gather_objects(self._epochs):
            for epoch, (good, counts) in part.items():
                before, sums = epochs.setdefault(epoch, (0, {}))
                epochs[epoch] = (before + good, _add(sums, counts))
        for epoch, (good, counts) in epochs.items():
            bad = _total(counts)
            reads = good + bad
            rows = self.epoch_rows
            over = epoch < max(epochs) or (rows is not None and good >= rows)
            if over and bad <= self.max_bad_ratio * reads:
                self._epochs.pop(epoch, None)
            elif over or self._clearly_too_many(bad, reads):
                listed = f"; they are listed in {self.path}" if self.path else ""
                raise self._refusal(f"{bad} of {reads} records", counts, listed)

    def judge_own(self) -> None:
        """Judge what this rank has read, without the others, while it goes through a set once.

        Raises:
            DataError: clearly too large a share cannot be read.
        """
        reads = self.good + self.total
        if self._clearly_too_many(self.total, reads):
            raise self._refusal(f"{self.total} of {reads} records", self.counts, "")

    def judge_all(self, dataset: str, bad: Sequence[BadRecord], lost: int, total: int, what: str) -> None:
        """List what is wrong with a set that has been looked at as a whole, and judge it.

        Args:
            dataset: its name.
            bad: the same on every rank.
            lost: number of things that cannot be used because of that.
            total: number of things.
            what: these things are.

        Raises:
            DataError: too large a share is lost.
        """
        if dist.is_main():
            self._list([(dataset, error) for error in bad])
        if lost > self.max_bad_ratio * total:
            counts = {dataset: Counter(error.cause for error in bad)}
            # A run that fails at its start leaves no folder, and so no list.
            raise self._refusal(f"{lost} of {total} {what}", counts, f"; the first is {bad[0]}")

    def summary(self) -> str:
        """What was skipped, per dataset and cause; empty when nothing was."""
        return _summary(self.counts)

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain values."""
        epochs = [[epoch, good, _plain(counts)] for epoch, (good, counts) in self._epochs.items()]
        return {"good": self.good, "bad": _plain(self.counts), "epochs": epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state`."""
        self.good = state["good"]
        self.counts = _add({}, state["bad"])
        self._epochs = {epoch: (good, _add({}, counts)) for epoch, good, counts in state["epochs"]}

    def _clearly_too_many(self, bad: int, reads: int) -> bool:
        """Whether the share of the whole epoch will be, or all but surely will be, above the limit."""
        ratio = self.max_bad_ratio
        if self.epoch_rows is not None and bad > ratio * (self.epoch_rows + bad):
            return True
        # Three standard deviations above the number that would be read by chance.
        chance = ratio * reads + 3 * math.sqrt(ratio * (1 - ratio) * reads)
        return reads >= self.min_reads and bad > chance

    def _refusal(self, share: str, counts: Counts, where: str) -> DataError:
        return DataError(
            f"{share} cannot be read ({_summary(counts)}), more than run.max_bad_ratio={self.max_bad_ratio:g}"
            f" allows{where}; mend the data ('blip data check' shows all), or raise the ratio"
        )

    def _list(self, bad: Iterable[tuple[str, BadRecord]]) -> None:
        lines = []
        for dataset, error in bad:
            if (dataset, error.name, error.cause) not in self._listed:
                self._listed.add((dataset, error.name, error.cause))
                entry = {"dataset": dataset, "record": error.name, "cause": error.cause}
                lines.append(json.dumps({**entry, "detail": error.detail}).encode() + b"\n")
        if not lines or not self.path:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
                file.write(b"\n")  # a killed run may have left half a line
            file.writelines(lines)


def _add(sums: Counts, counts: Mapping[str, Mapping[str, int]]) -> Counts:
    for dataset, causes in counts.items():
        sums.setdefault(dataset, Counter()).update(causes)
    return sums


def _total(counts: Counts) -> int:
    return sum(causes.total() for causes in counts.values())


def _plain(counts: Counts) -> dict[str, dict[str, int]]:
    return {dataset: dict(causes) for dataset, causes in counts.items()}


def _summary(counts: Counts) -> str:
    parts = []
    for dataset, causes in counts.items():
        parts.append(f"{dataset}: " + ", ".join(f"{n} {cause}" for cause, n in causes.most_common()))
    return "; ".join(parts)


def _listing(line: str) -> tuple[str, str, str]:
    entry = json.loads(line)
    return entry["dataset"], entry["record"], entry["cause"]
