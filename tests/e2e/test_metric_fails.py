"""A metric that fails at the end of a run costs that metric alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip import from_pretrained
from blip.build import execute
from blip.config.load import load_config
from blip.tasks import retrieval
from tests.e2e.conftest import Recipe
from tests.e2e.runs import train_lines

SHORT = {"max_iters": 2, "valid_splits": [], "save_freq": None, "eval_freq": None}


@pytest.fixture
def no_recalls(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def fails(*args: Any) -> dict[str, float]:
        raise ArithmeticError("no recalls today")

    monkeypatch.setattr(retrieval, "_recalls", fails)
    return monkeypatch


def test_predictions_weights_and_checkpoint_are_there_and_the_run_goes_on_with_the_metric_alone(
    no_recalls: pytest.MonkeyPatch, recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    given = [str(recipe("json", run=SHORT))], [f"run.output_dir={folder}"]
    with pytest.raises(ArithmeticError, match="no recalls today"):
        execute(load_config(*given[0], given[1]))
    [path] = (folder / "predictions").iterdir()
    said = path.read_text()
    assert len(json.loads(said)) == 16
    assert (folder / "checkpoints/last").exists()
    assert from_pretrained(folder).config.arch == "blip2"
    trained = train_lines(folder)
    assert len(trained) == 2

    no_recalls.undo()
    execute(load_config(*given[0], [*given[1], "run.resume=auto"]))
    assert train_lines(folder) == trained  # no step again
    assert path.read_text() == said
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "r_mean" in next(line for line in lines if line["split"] == "test")
    assert (folder / "report.html").exists()
