"""Facts about the run folder: whose it is, what stands in it, and that each step stands once."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip.config.load import load_config
from blip.config.schema import Config, DatasetConfig, ModelConfig, RunConfig
from blip.engine import environment, run_folder
from blip.engine.run_folder import Lines, open_folder
from blip.engine.tracker import Tracker
from blip.errors import CheckpointError, ConfigError


def config(folder: Path | None = None, name: str = "toy", **run: Any) -> Config:
    output_dir = None if folder is None else str(folder)
    settings = RunConfig(task="retrieval", max_iters=100, output_dir=output_dir, **run)
    return Config(ModelConfig(arch="blip2"), {"scenes": DatasetConfig()}, settings, name)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def train_line(step: int, **figures: float) -> dict[str, Any]:
    return {"split": "train", "step": step, "epoch": 0, "loss": 1 / step, **figures}


# Which folder


def test_the_default_folder_is_named_by_recipe_and_time_and_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAVIS's job id is minutes without the last digit: runs within ten minutes share a folder."""
    monkeypatch.chdir(tmp_path)
    folders = [Tracker(config(name="tiny/pre train")).folder for _ in range(3)]
    assert len(set(folders)) == 3
    for folder in folders:
        assert folder.parent == Path("output/tiny/pre-train")
        assert folder.name[:8].isdigit()
        assert (folder / "config.yaml").exists()


def test_a_recipe_name_does_not_lead_out_of_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_folder(config(name="../../etc")).parent == Path("output/etc")
    assert open_folder(config(name="")).parent == Path("output/run")


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    Tracker(config(tmp_path)).close()
    with pytest.raises(ConfigError) as error:
        Tracker(config(tmp_path))
    assert "already holds a run (config.yaml)" in str(error.value)
    assert "run.resume=auto" in str(error.value)


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    with Tracker(config(tmp_path)) as tracker:
        tracker.metrics(train_line(1))
        tracker.predictions("val", [])
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "skipped-1.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "my data").mkdir()
    Tracker(config(tmp_path, overwrite=True)).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "env.json", "my data", "notes.txt"]


def test_a_run_that_failed_at_once_is_in_nobody_s_way(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    Tracker(config(tmp_path / "mine")).abandon()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    Tracker(config(tmp_path / "run")).abandon()
    assert not (tmp_path / "run").exists()
    with Tracker(config(tmp_path / "run")) as tracker:
        tracker.metrics(train_line(1))
    Tracker(config(tmp_path / "run", resume="auto")).abandon()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_without_a_run_may_hold_other_things(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert Tracker(config(tmp_path)).folder == tmp_path


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.output_dir: cannot write to .*file"):
        Tracker(config(tmp_path / "file" / "run"))

    def read_only(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(ConfigError, match="Read-only file system; choose a folder that you may write to"):
        Tracker(config(tmp_path / "run"))


def checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as far as the run folder looks at it."""
    monkeypatch.setattr(run_folder, "checkpoint_at", lambda path: path)
    place = folder / "checkpoints/step-00000003"
    place.mkdir(parents=True)
    return place


def test_resuming_a_path_goes_on_in_its_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkpoint(tmp_path / "first", monkeypatch)
    assert Tracker(config(resume=str(place))).folder == tmp_path / "first"
    assert Tracker(config(tmp_path / "first", resume=str(place))).folder == tmp_path / "first"
    assert Tracker(config(tmp_path / "second", resume=str(place))).folder == tmp_path / "second"
    with pytest.raises(ConfigError, match="already holds a run"):
        Tracker(config(tmp_path / "second", resume=str(place)))


def test_a_wrong_path_to_resume_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Tracker(config(tmp_path / "run", resume=str(tmp_path / "gone/checkpoints/step-00000003")))
    assert list(tmp_path.iterdir()) == []


def test_auto_without_a_folder_starts_a_new_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Tracker(config(resume="auto")).folder.is_dir()
    assert "run.output_dir, which is not given" in caplog.text


# What stands in it


def test_config_yaml_is_enough_to_rerun(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {arch: blip2, num_query_token: 3}\n"
        "datasets: {scenes: {split: train}}\n"
        "run: {task: image_text_pretrain, max_iters: 7, init_lr: 3e-4}\n"
    )
    first = load_config(str(recipe), [f"run.output_dir={tmp_path / 'run'}", "run.batch_size_train=5"])
    Tracker(first).close()
    assert load_config(str(tmp_path / "run/config.yaml"), []) == first


def test_an_evaluation_leaves_the_configuration_of_the_run(tmp_path: Path) -> None:
    Tracker(config(tmp_path)).close()
    before = (tmp_path / "config.yaml").read_text()
    Tracker(config(tmp_path, resume="auto", evaluate=True, batch_size_eval=3)).close()
    assert (tmp_path / "config.yaml").read_text() == before
    Tracker(config(tmp_path, resume="auto", batch_size_eval=3)).close()
    assert (tmp_path / "config.yaml").read_text() != before


def test_the_environment_of_every_start_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", "a b"])
    Tracker(config(tmp_path)).close()
    monkeypatch.setattr(sys, "argv", ["train.py", "run.resume=auto"])
    Tracker(config(tmp_path, resume="auto")).close()
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["command_line"] == "train.py --cfg 'a b'"
    assert [start["command_line"] for start in content["resumed"]] == ["train.py run.resume=auto"]
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["hardware"]["processes"] == 1
    assert content["hardware"]["cores"] >= 1
    assert set(content["git"] or {"commit", "branch", "changed"}) == {"commit", "branch", "changed"}


def test_the_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [
        "train.py",
        "model.tokenizer=scenes",
        "run.hub_token=hf_verysecret",
        "--api-key",
        "verysecret2",
        "x.PASSWORD=verysecret3",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    described = environment.describe()
    assert "verysecret" not in json.dumps(described)
    assert described["command_line"] == (
        "train.py model.tokenizer=scenes 'run.hub_token=***' --api-key *** 'x.PASSWORD=***'"
    )
    assert described["variables"]["OMP_NUM_THREADS"] == "1"


def test_metrics_are_one_json_object_a_line_with_full_precision(tmp_path: Path) -> None:
    with Tracker(config(tmp_path)) as tracker:
        tracker.metrics({"split": "train", "step": torch.tensor(3), "loss": torch.tensor(0.1), "lr": 1 / 3})
        assert lines(tmp_path) == [
            {"split": "train", "step": 3, "loss": torch.tensor(0.1).item(), "lr": 1 / 3}
        ]
        tracker.metrics(
            {"split": "val", "step": 3, "r_mean": np.float32(50.5), "loss": math.nan, "top": math.inf}
        )
    assert lines(tmp_path)[1] == {"split": "val", "step": 3, "r_mean": 50.5, "loss": None, "top": None}


def test_predictions_are_one_a_line_and_keep_their_script(tmp_path: Path) -> None:
    with Tracker(config(tmp_path)) as tracker:
        rows: list[dict[str, Any]] = [
            {"image_id": torch.tensor(1), "caption": "ein grüner Würfel"},
            {"image_id": 2, "score": np.float64(0.5)},
        ]
        path = tracker.predictions("val/scenes: step 3", rows)
        empty = tracker.predictions("none", [])
    assert path == tmp_path / "predictions/val-scenes-step-3.json"
    text = path.read_text(encoding="utf-8")
    assert "grüner" in text
    assert len(text.splitlines()) == 4
    assert json.loads(text) == [
        {"image_id": 1, "caption": "ein grüner Würfel"},
        {"image_id": 2, "score": 0.5},
    ]
    assert json.loads(empty.read_text()) == []


def test_events_have_a_file_of_their_own(tmp_path: Path) -> None:
    with Tracker(config(tmp_path)) as tracker:
        tracker.event("nonfinite", step=4, samples=["scenes/1"])
        tracker.event("nonfinite", step=4, samples=["scenes/2"])
    assert [line["samples"] for line in lines(tmp_path, "events.jsonl")] == [["scenes/1"], ["scenes/2"]]
    assert not (tmp_path / "metrics.jsonl").exists()


# Each step once


def test_a_resumed_run_writes_the_lines_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def steps(tracker: Tracker, first: int, last: int) -> None:
        for step in range(first, last + 1):
            tracker.metrics(train_line(step))
            if step % 4 == 0:
                tracker.metrics({"split": "val", "step": step, "r_mean": float(step)})

    with Tracker(config(tmp_path / "straight")) as tracker:
        tracker.begin(12)
        steps(tracker, 1, 12)
    with Tracker(config(tmp_path / "killed")) as tracker:
        tracker.begin(12)
        steps(tracker, 1, 7)
        tracker.event("nonfinite", step=3)
        tracker.event("nonfinite", step=6)
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 8, "lo')
    # The checkpoint of step 4 was saved before the evaluation of step 4, which is done again.
    with Tracker(config(tmp_path / "killed", resume="auto")) as tracker:
        tracker.begin(12, step=4)
        tracker.metrics({"split": "val", "step": 4, "r_mean": 4.0})
        steps(tracker, 5, 12)
    texts = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("straight", "killed")]
    assert texts[0] == texts[1]
    assert [line["step"] for line in lines(tmp_path / "killed", "events.jsonl")] == [3]


def test_a_run_killed_before_its_first_checkpoint_starts_with_no_lines(tmp_path: Path) -> None:
    with Tracker(config(tmp_path)) as tracker:
        tracker.begin(10)
        tracker.metrics(train_line(1))
    with Tracker(config(tmp_path, resume="auto")) as tracker:
        tracker.begin(10, step=0)
    assert lines(tmp_path) == []


def test_an_evaluation_done_again_replaces_its_line(tmp_path: Path) -> None:
    with Tracker(config(tmp_path)) as tracker:
        tracker.metrics({"split": "test", "step": 5, "r_mean": 1.0})
        tracker.metrics({"split": "val", "step": 5, "r_mean": 1.0})
    with Tracker(config(tmp_path, resume="auto", evaluate=True)) as tracker:
        tracker.metrics({"split": "test", "step": 5, "r_mean": 2.0})
    assert [(line["split"], line["r_mean"]) for line in lines(tmp_path)] == [("val", 1.0), ("test", 2.0)]


@pytest.mark.parametrize(
    "rest", [b'{"split": "tr', b"\xff\xfe", b"[1]\n", b"null\n", b'{"split": "x"}\n', b"\n\n"]
)
def test_half_a_line_does_not_stop_a_run(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"split": "train", "step": 1}\n' + rest)
    content = Lines(path)
    content.rewind(5)
    content.put({"split": "train", "step": 2}, ("train", 2))
    content.rewind(1)
    assert lines(tmp_path) == [{"split": "train", "step": 1}]


# Mirrors


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    with Tracker(config(tmp_path, tensorboard=True)) as tracker:
        tracker.metrics(train_line(1, lr=0.5))
        tracker.metrics({"split": "val", "step": 1, "r_mean": 40.0, "note": "text"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"train/epoch", "train/loss", "train/lr", "val/r_mean"}
    assert found.Scalars("val/r_mean")[0].value == 40.0


def test_what_is_not_installed_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.tensorboard: .* pip install tensorboard"):
        Tracker(config(tmp_path / "a", tensorboard=True))
    with pytest.raises(ConfigError, match=r"run\.wandb: .* pip install wandb"):
        Tracker(config(tmp_path / "b", wandb="project"))


def test_wandb_goes_on_under_the_same_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[Any] = []

    def init(**options: Any) -> Any:
        started.append(options)
        return types.SimpleNamespace(
            log=lambda scalars, step: logged.append((step, scalars)), finish=lambda: logged.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with Tracker(config(tmp_path, wandb="mine")) as tracker:
        tracker.metrics(train_line(1))
    Tracker(config(tmp_path, wandb="mine", resume="auto")).close()
    assert logged == [(1, {"train/epoch": 0.0, "train/loss": 1.0}), "end", "end"]
    assert started[0]["project"] == "mine"
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["config"]["run"]["wandb"] == "mine"


def test_a_tracker_that_trains_shows_lines_where_there_is_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="blip.engine.display"), Tracker(config(tmp_path)) as tracker:
        tracker.begin(total_steps=20)
        tracker.step(1)
        tracker.metrics(train_line(2, samples_per_s=12.34, data_wait=0.25))
    assert "step 2/20  loss 0.5  12.3/s  wait 25%  eta" in caplog.text
