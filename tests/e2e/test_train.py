"""The training and evaluation commands: what they print, write, leave alone and refuse."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import blip
from blip.weights import read_weights
from tests.e2e.runs import Commands, differences, flat, lines, train_lines, write_recipe

Recipe = Callable[..., Path]
QUICK = {"max_iters": 4, "valid_splits": [], "test_splits": []}
"""Training steps only."""


def weights(folder: Path) -> dict[str, Tensor]:
    return read_weights(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(commands: Commands, tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A finished run with a moving average, whose best checkpoint is not the last; do not write into it."""
    folder = tmp_path_factory.mktemp("trained")
    run = {"ema_decay": 0.9, "eval_freq": 3, "save_freq": 1}
    recipe = write_recipe(folder / "recipe.yaml", data_root, "json", run=run)
    ended = commands("--cfg", recipe, f"run.output_dir={folder / 'run'}")
    assert ended.code == 0, ended.output
    return folder / "run"


def scores(folder: Path, split: str = "test") -> dict[str, Any]:
    """The only line of a split, without its step."""
    [line] = [line for line in lines(folder) if line["split"] == split]
    return {name: value for name, value in line.items() if name != "step"}


# Ways to start


def test_a_dry_run_shows_all_parts_and_leaves_nothing_behind(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for place in ([], [f"run.output_dir={here}/run"]):
        ended = commands("--cfg", recipe("json"), "--dry-run", *place, cwd=here)
        assert ended.code == 0, ended.output
        assert list(here.iterdir()) == []
    shown = ended.output
    for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
        [figures] = re.findall(rf"^{name} +([\d.]+), gradient norm ([\d.]+)$", shown, re.MULTILINE)
        assert all(float(figure) > 0 for figure in figures)
    assert re.search(r"parameters +0\.\d+ M, of which 0\.\d+ M train", shown)
    assert re.search(r"batch\.image +\(16, 3, 32, 32\) uint8", shown)
    assert "val of scenes, first 8: " in shown
    assert "test of scenes, first 8: " in shown
    assert "peak memory" in shown


def test_print_config_prints_a_recipe_with_the_origin_of_each_value(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    path = recipe("json")
    ended = commands("--cfg", path, "--print-config", "run.max_iters=5", cwd=tmp_path)
    assert ended.code == 0
    shown = yaml.safe_load(ended.output)
    assert shown["run"]["max_iters"] == 5
    assert re.search(r"max_iters: 5 +# command line", ended.output)
    assert re.search(r"k_test: 10 +# .*json\.yaml", ended.output)
    assert re.search(r"label_smoothing: 0\.1 +# default", ended.output)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_printed_config_is_a_recipe_for_the_same_run(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    printed = tmp_path / "printed.yaml"
    printed.write_text(commands("--cfg", recipe("json", run=QUICK), "--print-config").output)
    for path in (recipe("json", run=QUICK), printed):
        assert commands("--cfg", path, f"run.output_dir={tmp_path / path.stem}").code == 0
    assert train_lines(tmp_path / "printed") == train_lines(tmp_path / "json")


def test_lavis_spelling_and_the_blip_command_start_the_same_run(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    path, options = recipe("json", run=QUICK), ["run.seed=7", "run.max_iters=3"]
    assert commands("--cfg", path, f"run.output_dir={tmp_path / 'ours'}", *options).code == 0
    lavis = ["--cfg-path", path, "--options", f"run.output_dir={tmp_path / 'lavis'}", *options]
    assert commands(*lavis).code == 0
    command = [sys.executable, "-m", "blip", "train", "--cfg", str(path), *options]
    done = subprocess.run([*command, f"run.output_dir={tmp_path / 'blip'}"], check=False)
    assert done.returncode == 0
    assert len(train_lines(tmp_path / "ours")) == 3
    assert train_lines(tmp_path / "lavis") == train_lines(tmp_path / "ours")
    assert train_lines(tmp_path / "blip") == train_lines(tmp_path / "ours")


def test_a_run_without_a_folder_gets_one_by_recipe_and_time(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    ended = commands("--cfg", recipe("json", run={**QUICK, "max_iters": 1}), cwd=tmp_path)
    assert ended.code == 0
    [folder] = (tmp_path / "output" / "json").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", folder.name)
    assert (folder / "metrics.jsonl").exists()


# What is left behind


def test_a_run_folder_holds_what_the_contract_says(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "predictions",
        "report.html",
    }
    environment = json.loads((trained / "env.json").read_text())
    assert "run.output_dir" in json.dumps(environment)  # the command line
    first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    names = (
        "split step epoch loss loss_itc loss_itm loss_lm itc_acc itm_acc lr grad_norm samples_per_s data_wait"
        " loader_busy"
    )
    assert set(names.split()) <= first.keys()
    steps = [(line["split"], line["step"]) for line in lines(trained)]
    assert [step for split, step in steps if split == "train"] == list(range(1, 13))
    assert [step for split, step in steps if split == "val"] == [3, 6, 9, 12]
    assert steps[-1][0] == "test"
    test = scores(trained)
    recalls = {f"{side}_r{k}" for side in ("txt", "img") for k in (1, 5, 10)} | {"r_mean"}
    assert recalls <= test.keys()
    assert all(0 <= test[name] <= 100 for name in recalls)
    for name in ("last", "best"):
        assert (trained / "checkpoints" / name / "state.json").is_file()
    predictions = json.loads(next((trained / "predictions").glob("test-*")).read_text())
    assert len(predictions) == 16
    assert {"truth", "found", "score"} <= predictions[0].keys()


def test_the_exported_model_is_read_back_by_from_pretrained(trained: Path) -> None:
    model = blip.from_pretrained(trained)
    assert differences(flat(model.state_dict(), ""), flat(weights(trained), "")) == []


def test_config_yaml_reruns_to_the_same_losses(commands: Commands, trained: Path, tmp_path: Path) -> None:
    again = ["--cfg", trained / "config.yaml", f"run.output_dir={tmp_path / 'run'}", "run.test_splits=[]"]
    assert commands(*again, "run.valid_splits=[]").code == 0
    assert train_lines(tmp_path / "run") == train_lines(trained)


def test_the_report_is_one_page_that_needs_nothing_else(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|\#)[^"']*""", page)
    assert "http" not in re.sub(r"http://www\.w3\.org/[\w/]+", "", page.split("</style>")[-1])
    assert "@import" not in page
    assert page.count("<svg") >= 4  # the losses' curves
    assert "data:image/" in page
    for line in json.loads(next((trained / "predictions").glob("test-*")).read_text())[:3]:
        assert line["truth"][0] in page
    assert f"{scores(trained)['txt_r10']:.1f}"[:3] in page


# Evaluating, starting from a run


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.multi)])
def test_evaluating_a_run_gives_the_scores_that_training_ended_with(
    commands: Commands, trained: Path, tmp_path: Path, world: int
) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    configured, exported = (copy / "config.yaml").read_bytes(), flat(weights(copy), "")
    *others, test = lines(trained)
    for _ in range(2):
        options = [f"run.output_dir={copy}", "run.resume=auto"]
        ended = commands("--cfg", copy / "config.yaml", *options, module="blip.evaluate", world=world)
        assert ended.code == 0, ended.output
        assert (copy / "config.yaml").read_bytes() == configured
        assert differences(flat(weights(copy), ""), exported) == []
        *before, again = lines(copy)
        assert before == others
        assert again == (test if world == 1 else pytest.approx(test))
    new = [f"run.output_dir={tmp_path / 'new'}", f"model.init_from={trained}"]
    ended = commands("--cfg", trained / "config.yaml", *new, module="blip.evaluate", world=world)
    assert ended.code == 0, ended.output
    assert scores(tmp_path / "new") == pytest.approx(scores(trained))


def test_predictions_of_an_evaluation_are_those_of_the_training(
    commands: Commands, trained: Path, tmp_path: Path
) -> None:
    """Scores of a tiny model are few; what it says about each picture is finer."""
    new = [f"run.output_dir={tmp_path / 'new'}", f"model.init_from={trained}"]
    assert commands("--cfg", trained / "config.yaml", *new, module="blip.evaluate").code == 0
    copy = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    [before] = [path.read_text() for path in (copy / "predictions").glob("test-*")]
    resumed = [f"run.output_dir={copy}", "run.resume=auto"]
    assert commands("--cfg", trained / "config.yaml", *resumed, module="blip.evaluate").code == 0
    for folder in (tmp_path / "new", copy):
        [predictions] = (folder / "predictions").glob("test-*")
        assert predictions.read_text() == before


def test_evaluating_nothing_in_particular_is_refused(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    ended = commands("--cfg", recipe("json"), f"run.output_dir={tmp_path / 'run'}", module="blip.evaluate")
    assert "nothing says which weights to evaluate" in ended.refusal()


def test_init_from_starts_a_new_run_with_the_weights_of_another(
    commands: Commands, trained: Path, recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = [f"model.init_from={trained}", f"run.output_dir={folder}", "run.init_lr=1e-12", "run.min_lr=0"]
    ended = commands("--cfg", recipe("json", run={**QUICK, "max_iters": 1}), *options)
    assert ended.code == 0, ended.output
    assert [line["step"] for line in train_lines(folder)] == [1]  # not the 13th
    assert all(torch.allclose(weights(folder)[n], w, atol=1e-6) for n, w in weights(trained).items())
    message = commands("--cfg", recipe("json"), f"model.init_from={tmp_path}/no", "run.max_iters=1").refusal()
    assert "no weights at" in message


# What must not stop a run, and what must


def test_non_finite_steps_are_skipped_and_counted(commands: Commands, recipe: Recipe, tmp_path: Path) -> None:
    folder, steps = tmp_path / "run", tmp_path / "steps"
    steps.mkdir()
    traps: list[list[Any]] = [["poison", 3, 4], ["dump_weights", str(steps)]]
    options = [f"run.output_dir={folder}", "run.max_iters=7"]
    ended = commands("--cfg", recipe("json", run=QUICK), *options, traps=traps)
    assert ended.code == 0, ended.output
    assert ended.output.count("a gradient is not finite; the step is skipped") == 2
    found = [line.get("skipped") for line in train_lines(folder)]
    assert found == [None, None, None, 1, 2, 2, 2]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "nonfinite"] == [4, 5]
    assert all(len(event["samples"]) == 16 for event in events)
    at = [flat(torch.load(steps / f"step-{step}.pt"), "") for step in range(1, 8)]
    assert differences(at[2], at[3]) == differences(at[3], at[4]) == []
    assert len(differences(at[4], at[5])) > 20
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())


def test_too_many_non_finite_steps_in_a_row_end_a_run_and_name_samples(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    options = [f"run.output_dir={tmp_path / 'run'}", "run.max_iters=9", "run.max_nonfinite=3"]
    traps: list[list[Any]] = [["poison", 2, 8]]
    ended = commands("--cfg", recipe("json", run=QUICK), *options, traps=traps)
    assert "run.max_nonfinite: 3 steps in a row" in ended.refusal()
    assert re.search(r"with the samples scenes/\d+", ended.refusal())
    assert [line["step"] for line in train_lines(tmp_path / "run")][-1] in (4, 5)


@pytest.fixture
def harmed_root(data_root: Path, tmp_path: Path) -> Path:
    """The data with three training pictures cut off and one validation picture missing."""
    root = tmp_path / "harmed"
    shutil.copytree(data_root, root)
    for number in (3, 20, 41):
        path = root / f"scenes/images/train/{number:06d}.png"
        path.write_bytes(path.read_bytes()[:300])
    (root / "scenes/images/val/000005.png").unlink()
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_skipped_counted_and_listed(
    commands: Commands, recipe: Recipe, harmed_root: Path, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "run"
    options = [f"run.data_root={harmed_root}", f"run.output_dir={folder}", f"run.num_workers={workers}"]
    ended = commands("--cfg", recipe("json"), *options, "run.max_iters=9", "run.max_bad_ratio=0.2")
    assert ended.code == 0, ended.output
    assert len(train_lines(folder)) == 9
    listed = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    # Records 2n and 2n + 1 are the captions of picture n; nine steps are more than one epoch of 8.
    expected = {f"scenes/{2 * n + which}" for n in (3, 20, 41) for which in (0, 1)} | {"scenes/5"}
    assert {entry["record"] for entry in listed} == expected
    assert {entry["cause"] for entry in listed} == {"truncated_image", "missing_image"}
    assert len(listed) == 7
    predictions = json.loads(next((folder / "predictions").glob("val-*")).read_text())
    assert len(predictions) == 15
    state = torch.load(folder / "checkpoints/last/rank-00000.pt", weights_only=True)["skips"]
    assert sum(state["bad"]["scenes"].values()) >= 7


def test_too_many_bad_pictures_end_a_run(
    commands: Commands, recipe: Recipe, harmed_root: Path, tmp_path: Path
) -> None:
    options = [f"run.data_root={harmed_root}", f"run.output_dir={tmp_path / 'run'}", "run.max_iters=40"]
    ended = commands("--cfg", recipe("json"), *options, "run.max_bad_ratio=0.01")
    assert "more than run.max_bad_ratio=0.01 allows" in ended.refusal()


def test_an_unreadable_shard_is_passed_over_and_listed(
    commands: Commands, recipe: Recipe, data_root: Path, tmp_path: Path
) -> None:
    root, folder = tmp_path / "harmed", tmp_path / "run"
    shutil.copytree(data_root, root)
    shard = root / "scenes/shards/train-00007.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    options = [f"run.data_root={root}", f"run.output_dir={folder}", "run.max_bad_ratio=0.2"]
    ended = commands("--cfg", recipe("shards", run=QUICK), *options, "run.max_iters=8")
    assert ended.code == 0, ended.output
    assert "train-00007.tar" in (folder / "skipped.jsonl").read_text()


# What trains and what does not


def test_the_tower_trains_first_and_is_then_frozen_bit_for_bit(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    steps = tmp_path / "steps"
    steps.mkdir()
    folder = tmp_path / "run"
    ended = commands(
        *("--cfg", recipe("json", run={**QUICK, "max_iters": 8, "warmup_steps": 1})),
        f"run.output_dir={folder}",
        traps=[["dump_weights", str(steps)]],
    )
    assert ended.code == 0, ended.output
    at = [torch.load(steps / f"step-{step}.pt") for step in range(1, 9)]
    tower = [name for name in at[0] if name.startswith("vision.")]
    others = [name for name in at[0] if not name.startswith("vision.")]

    def changed(step: int, names: list[str]) -> list[str]:
        """What step number `step` has changed."""
        return [name for name in names if not torch.equal(at[step - 2][name], at[step - 1][name])]

    # The first step is at the warm-up's rate of 0; vit_train_steps is 3.
    for step in (2, 3):
        assert len(changed(step, tower)) >= len(tower) - 1
    for step in range(4, 9):
        assert changed(step, tower) == []
        assert len(changed(step, others)) > len(others) // 2
    final = weights(folder)
    assert all(torch.equal(final[name], at[2][name]) for name in tower)


def test_the_temperature_and_queries_have_no_weight_decay(trained: Path) -> None:
    """LAVIS decays the temperature, which pulls it to 0."""
    state = torch.load(trained / "checkpoints/last/optimizer.pt", weights_only=True)["optimizer"]
    decays = {name: group["weight_decay"] for group in state["param_groups"] for name in group["param_names"]}
    assert decays["temp"] == 0
    assert [decay for name, decay in decays.items() if name.endswith("bias")] == [0.0] * sum(
        name.endswith("bias") for name in decays
    )
    assert decays["vision_proj.weight"] == 0.05


def test_the_exported_weights_are_the_averaged_ones(trained: Path) -> None:
    best = (trained / "checkpoints/best").resolve()
    average = torch.load(best / "optimizer.pt", weights_only=True)["ema"]["averages"]
    exported, raw = weights(trained), read_weights(best / "model.safetensors")
    assert average.keys() <= exported.keys()
    assert "temp" in average
    for name, tensor in exported.items():
        assert torch.equal(tensor, average.get(name, raw[name])), name
    assert any(not torch.equal(exported[name], raw[name]) for name in average)


def test_losses_fall(commands: Commands, recipe: Recipe, tmp_path: Path) -> None:
    run = {**QUICK, "max_iters": 60, "log_freq": 10, "save_freq": None}
    assert commands("--cfg", recipe("json", run=run), f"run.output_dir={tmp_path / 'run'}").code == 0
    figures = train_lines(tmp_path / "run")
    assert [line["step"] for line in figures] == [10, 20, 30, 40, 50, 60]
    assert figures[-1]["loss"] < figures[0]["loss"] - 0.5
    assert figures[-1]["loss_lm"] < 0.9 * figures[0]["loss_lm"]
    assert figures[-1]["loss_itc"] < math.log(16)
