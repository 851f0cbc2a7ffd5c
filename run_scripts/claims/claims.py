"""What a claim is, and what the runs say about it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run_scripts.claims.jobs import Job
from run_scripts.claims.settings import Lab


@dataclass(frozen=True)
class Measure:
    """A figure of a run."""

    name: str
    read: Callable[[Path], float | None]
    """The run's folder -> the figure; None where a run has none."""
    digits: int = 1


@dataclass(frozen=True)
class Expected:
    """What the paper says of two arms, by some of the measures."""

    better: str
    worse: str
    measures: tuple[str, ...]
    how: str = "better than"
    """What it says: the first is this, compared to the second; `EQUAL` if it finds no difference."""


EQUAL = "no better or worse than"


@dataclass(frozen=True)
class Bound:
    """What an arm has to reach, on the mean over seeds."""

    arm: str
    measure: str
    least: float


@dataclass(frozen=True)
class Claim:
    """Arms that differ in one thing, and what the paper says about them."""

    name: str
    title: str
    source: str
    about: str
    """What is done here, and how it differs from the paper."""
    arms: Mapping[str, Callable[[Lab, int], Job]]
    """Name -> the job whose folder is measured, for a seed."""
    measures: tuple[Measure, ...]
    expected: tuple[Expected, ...]
    bounds: tuple[Bound, ...] = ()
    paper: Mapping[str, str] = field(default_factory=dict)
    """Arm -> the paper's own figures, as text, under the heading `paper_columns`."""
    paper_columns: str = ""
    tried: str = ""
    """What was tried where it does not reproduce, and what is known about why."""

    def jobs(self, lab: Lab, seeds: Sequence[int]) -> list[Job]:
        """The jobs that are measured."""
        return [make(lab, seed) for make in self.arms.values() for seed in seeds]


AGREES = ("yes", "no difference seen")
UNDECIDED = ("within the spread", "not seen")
DISAGREES = ("the opposite", "a difference")


@dataclass(frozen=True)
class Compared:
    """Two arms by one measure."""

    better: str
    worse: str
    measure: Measure
    gain: float
    """Mean of the arm that should be better, less that of the other."""
    spread: float
    """Standard deviation of the difference of two single runs, over seeds."""
    how: str = "better than"
    """What the paper says of them."""

    @property
    def verdict(self) -> str:
        """In words."""
        if math.isnan(self.spread):
            return "one seed: no spread"
        if self.how == EQUAL:
            return "no difference seen" if abs(self.gain) <= self.spread else "a difference"
        if abs(self.gain) <= self.spread:
            return "within the spread" if self.gain > 0 else "not seen"
        return "yes" if self.gain > 0 else "the opposite"


@dataclass(frozen=True)
class Result:
    """What the runs of a claim came to."""

    claim: Claim
    seeds: tuple[int, ...]
    values: Mapping[str, Mapping[str, tuple[float, ...]]]
    """Arm -> measure -> one figure per seed."""
    minutes: float
    """Of computing, those of shared runs included."""

    def compared(self) -> list[Compared]:
        """Every pair that the paper says something about."""
        found = []
        for one in self.claim.expected:
            for measure in self.claim.measures:
                if measure.name in one.measures:
                    better, worse = (self.values[arm][measure.name] for arm in (one.better, one.worse))
                    gain = statistics.mean(better) - statistics.mean(worse)
                    spread = math.hypot(deviation(better), deviation(worse))
                    found.append(Compared(one.better, one.worse, measure, gain, spread, one.how))
        return found

    def reached(self) -> list[tuple[Bound, float]]:
        """Every bound with what was come to."""
        return [(b, statistics.mean(self.values[b.arm][b.measure])) for b in self.claim.bounds]

    def verdict(self) -> str:
        """All comparisons in a few words, and whether what is asked for is reached."""
        if len(self.seeds) == 1:
            return "undecided: one seed has no spread"
        found = [one.verdict for one in self.compared()]
        counts = {word: found.count(word) for word in (*AGREES, *UNDECIDED, *DISAGREES) if word in found}
        good, bad = (sum(found.count(word) for word in words) for words in (AGREES, DISAGREES))
        if good == len(found):
            word = "reproduces"
        elif found.count("yes"):
            word = "in part"
        else:
            word = "does not reproduce" if bad else "undecided"
        told = f"{word}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
        missed = [bound.measure for bound, value in self.reached() if value < bound.least]
        return told + (f"; below what is asked: {', '.join(missed)}" if missed else "")

    def as_values(self) -> dict[str, Any]:
        """For JSON."""
        compared = [
            {
                "better": one.better,
                "worse": one.worse,
                "paper": one.how,
                "measure": one.measure.name,
                "gain": one.gain,
                "spread": None if math.isnan(one.spread) else one.spread,
                "verdict": one.verdict,
            }
            for one in self.compared()
        ]
        bounds = [
            {"arm": b.arm, "measure": b.measure, "least": b.least, "value": value}
            for b, value in self.reached()
        ]
        return {
            "claim": self.claim.name,
            "source": self.claim.source,
            "seeds": list(self.seeds),
            "values": self.values,
            "compared": compared,
            "bounds": bounds,
            "verdict": self.verdict(),
            "minutes": round(self.minutes, 1),
        }


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; NaN of a single one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def result_of(claim: Claim, lab: Lab, seeds: Sequence[int], minutes: float) -> Result:
    """Read the figures of finished runs.

    Raises:
        ValueError: a run has not the figure that an expectation is about.
    """
    values: dict[str, dict[str, tuple[float, ...]]] = {}
    for arm, make in claim.arms.items():
        folders = [make(lab, seed).folder for seed in seeds]
        values[arm] = {}
        for measure in claim.measures:
            read = [measure.read(folder) for folder in folders]
            known = tuple(value for value in read if value is not None)
            if len(known) == len(folders):
                values[arm][measure.name] = known
            elif known:
                raise ValueError(f"{folders[0].parent}: some seeds have no {measure.name}")
    for one in claim.expected:
        for name in one.measures:
            if lacking := [arm for arm in (one.better, one.worse) if name not in values[arm]]:
                raise ValueError(f"{claim.name}: {lacking[0]!r} has no {name}")
    return Result(claim, tuple(seeds), values, minutes)


# Figures of runs


def score(name: str, key: str, digits: int = 1, scale: float = 1.0, below: str = "") -> Measure:
    """The last `key` of the test split; of the run in the folder `below`, if that is said."""

    def read(folder: Path) -> float | None:
        path = folder / below / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tested = [line for line in lines if line["split"] == "test"]
        if not tested:
            raise ValueError(f"{path}: nothing of the test split")
        value = tested[-1].get(key)
        return None if value is None else scale * value

    return Measure(name, read, digits)


def mean_score(name: str, *keys: str) -> Measure:
    """The mean of several scores."""
    parts = [score(name, key) for key in keys]

    def read(folder: Path) -> float | None:
        values = [part.read(folder) for part in parts]
        known = [value for value in values if value is not None]
        return statistics.mean(known) if len(known) == len(keys) else None

    return Measure(name, read)
