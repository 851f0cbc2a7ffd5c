"""Which texts are kept, by fixed and by relative thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blip.capfilt.select import BINS, Tally, choose, thresholds
from blip.tasks.capfilt import KeepConfig

RNG = np.random.default_rng(0)


def line(*texts: tuple[str, float, float]) -> dict[str, Any]:
    return {
        "picture": "p",
        "texts": [{"caption": str(i), "origin": o, "itm": m, "itc": c} for i, (o, m, c) in enumerate(texts)],
    }


def captions(keep: KeepConfig, one: dict[str, Any]) -> list[str]:
    return [text["caption"] for text in choose(one, keep, thresholds(keep, [one]))]


ONE = line(("web", 0.5, 0.9), ("web", 0.49, 0.2), ("synthetic", 0.8, 0.3), ("synthetic", 0.99, -0.1))


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({}, "023"),  # BLIP: what the head calls a match
        ({"itm": None}, "0123"),
        ({"itm": None, "itc": 0.25}, "02"),
        ({"itm": 0.6, "itc": 0.0}, "2"),
        ({"best": 2}, "32"),
        ({"itm": None, "best": 2, "best_by": "itc"}, "02"),  # BLIP-2: by similarity
        ({"best": 9}, "320"),
        ({"itm": 0.999}, ""),
    ],
)
def test_fixed_rules(keep: dict[str, Any], kept: str) -> None:
    assert captions(KeepConfig(**keep), ONE) == list(kept)


def test_quantiles_drop_their_share_of_each_origin() -> None:
    lines = [
        line(("web", float(a), 0.0), ("synthetic", float(b), float(c))) for a, b, c in RNG.random((1000, 3))
    ]
    keep = KeepConfig(itm=None, itm_quantile=0.3)
    least = thresholds(keep, lines)
    kept = [text["origin"] for one in lines for text in choose(one, keep, least)]
    assert kept.count("web") == kept.count("synthetic") == 700
    both = KeepConfig(itm=0.9, itm_quantile=0.3)
    assert thresholds(both, lines)["web"] == {"itm": 0.9}  # the stricter one
    two = KeepConfig(itm=None, itm_quantile=0.1, itc_quantile=0.2)
    assert thresholds(two, lines)["web"]["itc"] == 0.0  # equal scores are not parted
    assert thresholds(KeepConfig(itm=None, itm_quantile=1.0), lines)["web"]["itm"] == max(
        one["texts"][0]["itm"] for one in lines
    )


def test_fixed_rules_read_no_score() -> None:
    assert thresholds(KeepConfig(), iter(())) == {"web": {"itm": 0.5}, "synthetic": {"itm": 0.5}}


def test_a_tally_counts_everything_once() -> None:
    tally = Tally()
    keep = KeepConfig()
    least = thresholds(keep, ())
    bad = {"picture": "x", "cause": "empty_image", "detail": ""}
    for one in (ONE, {**ONE, "dropped": ["no_caption", "no_caption"]}, line(("web", 0.0, -1.0))):
        tally.add(one, choose(one, keep, least))
    tally.add(bad, [])
    tally.add({**bad, "cause": "truncated_shard", "whole": True}, [])
    found = tally.values()
    assert found["pictures"] == 4
    assert found["unreadable"] == {"empty_image": 1, "truncated_shard": 1}
    assert found["without_text"] == 1
    assert found["texts"] == {"web": 5, "synthetic": 4}
    assert found["kept"] == {"web": 2, "synthetic": 4}
    assert found["removed"] == {"web": pytest.approx(0.6), "synthetic": 0}
    assert found["not_judged"] == {"no_caption": 2}
    assert sum(found["histograms"]["itm"]["web"]) == 5
    assert found["histograms"]["itm"]["web"][BINS // 2] == 2
    assert found["histograms"]["itc"]["web"][0] == 1
    assert "2 of 5 web texts kept, 60.0% removed" in tally.line()
