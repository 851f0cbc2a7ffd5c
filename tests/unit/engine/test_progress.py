"""Figures of how quick a run was, and the line about its data."""

from __future__ import annotations

from typing import Any

import pytest

from blip.engine.progress import Intake, Window


def step(**sources: int) -> list[dict[str, Any]]:
    return [{"source": name, "batch_total": rows} for name, rows in sources.items()]


def test_rates_are_shares_of_the_time_and_tell_of_fetching_where_there_is_any() -> None:
    window = Window()
    assert window.rates() == {}
    window.time(60, 2.0, 0.5)
    window.load(1.0, 0.0, 0)
    window.time(60, 2.0, 0.5)
    window.load(2.0, 0.0, 0)
    local = {"samples_per_s": 30.0, "data_wait": 0.25, "loader_busy": 0.75}
    assert window.rates() == local
    window.load(0.0, 1.0, 8_000_000)
    assert window.rates() == local | {"fetch_mb_per_s": 2.0, "fetch_wait": 0.25}
    assert window.state_dict() == {"sums": {}, "counts": {}}
    window.clear()
    assert window.rates() == {}


@pytest.mark.parametrize(
    ("waited", "load", "told"),
    [
        (0.1, (0.5, 0.0, 0), "waited for 5% of the time, loader processes busy 25%"),
        (
            1.0,
            (2.0, 0.0, 0),
            "waited for 50% of the time, loader processes busy 100%; more run.num_workers or faster disks"
            " would help",
        ),
        (
            1.0,
            (1.9, 1.5, 5_000_000),
            "waited for 50% of the time, loader processes busy 95% (75% waiting for shards; 5.0 MB fetched at"
            " 2.5 MB/s); the network is too slow",
        ),
    ],
)
def test_the_last_line_says_where_data_came_from_and_what_was_slow(
    waited: float, load: tuple[float, float, int], told: str
) -> None:
    intake = Intake()
    intake.add(step(web=30, coco=10), 1.0, waited, load)
    intake.add(step(web=40), 1.0, 0.0, (0.0, 0.0, 0))
    assert intake.text() == f"data: 80 samples (web 70, coco 10); {told}"
