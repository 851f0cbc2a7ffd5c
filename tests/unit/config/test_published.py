"""Published scores in a configuration: what is read, what is refused and how."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from blip.config.load import load_config
from blip.config.published import Published, published_problems, read_published
from blip.config.schema import SPLITS
from blip.errors import ConfigError

ROW = {"source": "a paper, table 1", "data": "scenes/test", "scores": {"CIDEr": 133.3}}


def test_a_row_is_read_as_it_stands() -> None:
    more = {"model_type": "base", "weights": "a.pth", "server": "test-dev", "note": "by hand"}
    rows = read_published([ROW, {**ROW, **more}, {**ROW, "weights": ["a.pth", "b.pth"]}])
    scores = {"CIDEr": 133.3}
    assert rows == [
        Published("a paper, table 1", "scenes/test", scores),
        Published("a paper, table 1", "scenes/test", scores, "base", ("a.pth",), "test-dev", "by hand"),
        Published("a paper, table 1", "scenes/test", scores, weights=("a.pth", "b.pth")),
    ]
    assert (rows[0].dataset, rows[0].split) == ("scenes", "test")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sorce": "x"}, "published.0.sorce: no such key; did you mean 'source'?"),
        ({"source": ""}, "published.0.source: missing"),
        ({"scores": {}}, "published.0.scores: missing"),
        ({"scores": [1]}, "published.0.scores: not a section of metrics and values"),
        ({"scores": {"CIDEr": "high"}}, "published.0.scores.CIDEr: 'high' is not a number"),
        ({"scores": {"CIDEr": True}}, "published.0.scores.CIDEr: True is not a number"),
        (
            {"data": "scenes"},
            "published.0.data: 'scenes' is not DATASET/SPLIT with a split of train, val, test",
        ),
        (
            {"data": "scenes/test-dev"},
            "published.0.data: 'scenes/test-dev' is not DATASET/SPLIT with a split of train, val, test",
        ),
        ({"note": 3}, "published.0.note: 3 is not a text"),
        ({"weights": [3]}, "published.0.weights: not the name of a file, or a list of such names"),
        ({"weights": 3}, "published.0.weights: not the name of a file, or a list of such names"),
    ],
)
def test_what_cannot_be_used_is_named(change: dict[str, Any], problem: str) -> None:
    assert published_problems([{**ROW, **change}], SPLITS) == [problem]
    assert published_problems([ROW], SPLITS) == []


def recipe(tmp_path: Any, *rows: Any) -> str:
    path = tmp_path / "mine.yaml"
    content = {
        "model": {"arch": "blip_caption"},
        "datasets": {"scenes": {}},
        "run": {"task": "captioning", "evaluate": True, "published": list(rows)},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_key_is_part_of_every_configuration(tmp_path: Any) -> None:
    assert load_config(recipe(tmp_path, ROW)).run.published == [ROW]
    with pytest.raises(ConfigError, match=r"run\.published\.0\.scorse \(.*mine\.yaml\): no such key"):
        load_config(recipe(tmp_path, {**ROW, "scorse": {}}))
    with pytest.raises(ConfigError, match="would be computed, and a recipe is data"):
        load_config(recipe(tmp_path, {**ROW, "note": "${oc.env:HOME}"}))
