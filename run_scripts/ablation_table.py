"""Print the scores of runs that differ in one thing, as mean and standard deviation over seeds.

python run_scripts/ablation_table.py RUNS --arms A B ... --seeds 1 2 3 --scores REGEX

RUNS is the path of a run with {arm} and {seed} in it, whose last scores of the test split are taken.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path


def scores(run: Path) -> dict[str, float]:
    """The last scores of the test split of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["split"] == "test"][-1]


def path(runs: str, arm: str, seed: str) -> Path:
    """Where a run lies."""
    return Path(runs.replace("{arm}", arm).replace("{seed}", seed))


def table(runs: str, arms: list[str], seeds: list[str], wanted: str) -> str:
    """A row per score, a column per arm."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in arms:
        for seed in seeds:
            for name, value in scores(path(runs, arm, seed)).items():
                if re.fullmatch(wanted, name):
                    found.setdefault(name, {}).setdefault(arm, []).append(value)
    width = max(map(len, found), default=0) + 2
    rows = [" " * width + "".join(f"{arm:>16}" for arm in arms)]
    for name, by_arm in found.items():
        cells = []
        for arm in arms:
            values = by_arm.get(arm, [])
            if not values:  # nothing was scored that way there
                cells.append("-".rjust(16))
                continue
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 1 if max(map(abs, values)) >= 10 else 2
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}".rjust(16))
        rows.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs")
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", required=True)
    parser.add_argument("--scores", required=True)
    args = parser.parse_args()
    print(f"\nMean of seeds {', '.join(args.seeds)} and standard deviation")
    print(table(args.runs, args.arms, args.seeds, args.scores))
    print(f"Reports: {path(args.runs, '*', '*')}/report.html")
