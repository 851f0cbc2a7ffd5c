"""LAVIS's trainer has defects; each that concerns what is here is shown not to be shared.

`lavis_defects.SHOWN` maps them to the tests that show it: those of this file and many others.
"""

from __future__ import annotations

import functools
import json
import math
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import distributed as td
from torch.nn.parallel import DistributedDataParallel

from blip import dist
from blip.config.schema import DatasetConfig, RunConfig
from blip.data.loader import LoaderConfig, TrainLoader
from blip.data.sources import build_dataset
from blip.engine.parallel import Parallel
from blip.errors import ConfigError
from blip.models.qformer import QFormer
from blip.models.tokenizer import WordPieces
from blip.registry import Registry
from blip.weights import read_weights
from tests.e2e.conftest import Recipe
from tests.e2e.lavis_defects import SHOWN
from tests.e2e.runs import (
    EYES,
    HELD_OUT,
    ROOT,
    Commands,
    differences,
    flat,
    functions_in,
    lines,
    train_lines,
    write_recipe,
)
from tests.e2e.wrong import SHORT
from tests.reference.small_stage1 import global_batch, part_of, small_model


@pytest.mark.parametrize("defect", SHOWN)
def test_every_defect_has_tests_that_are_there(defect: str) -> None:
    for test in SHOWN[defect]:
        path, _, name = test.partition("::")
        assert name in functions_in(ROOT / "tests" / path), f"{test} is gone; name the one that shows it now"


# Optimisation


@pytest.mark.parametrize("mode", ["mean", "cached"])
def test_the_logged_loss_is_the_sum_of_its_parts_whatever_the_accumulation(
    commands: Commands, recipe: Recipe, tmp_path: Path, mode: str
) -> None:
    run = {**SHORT, "accum_grad_iters": 4, "batch_size_train": 4, "accum_mode": mode}
    assert commands("--cfg", recipe(run=run), f"run.output_dir={tmp_path / 'run'}").code == 0
    for line in train_lines(tmp_path / "run"):
        assert line["loss"] == pytest.approx(line["loss_itc"] + line["loss_itm"] + line["loss_lm"], rel=1e-5)
        assert line["loss_lm"] > 5  # of 302 words, all but equally likely


def test_no_gradient_goes_from_one_epoch_to_the_next(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    # 8 micro-batches an epoch: steps of 3, 3 and 2. A process that begins behind them has no gradients.
    run = {**SHORT, "accum_grad_iters": 3, "drop_last": False, "save_freq": 1, "lr_sched": "constant_lr"}
    cfg, places = recipe(run=run), [f"run.output_dir={tmp_path / name}" for name in ("whole", "parts")]
    assert commands("--cfg", cfg, places[0], "run.max_iters=5").code == 0
    assert commands("--cfg", cfg, places[1], "run.max_iters=3").code == 0
    assert commands("--cfg", cfg, places[1], "run.max_iters=5", "run.resume=auto").code == 0
    assert [line["epoch"] for line in train_lines(tmp_path / "whole")] == [0, 0, 0, 1, 1]
    weights = [flat(read_weights(tmp_path / name), "model") for name in ("whole", "parts")]
    assert differences(*weights) == []


def test_gradients_are_clipped_to_the_norm_that_is_asked_for() -> None:

    parallel = Parallel(RunConfig(max_iters=1, device="cpu"))
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    for limit, expected in ((1.0, 1.0), (10.0, 5.0), (None, 5.0)):
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])
        assert float(parallel.clip_grads(parameters, limit)) == pytest.approx(5.0)  # the norm before
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
        assert norm == pytest.approx(expected, rel=1e-5)


def test_the_temperature_can_be_kept_above_a_bound(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    run = {**SHORT, "max_iters": 3, "init_lr": 0.2, "min_lr": 0.2, "warmup_steps": 0, "max_grad_norm": None}
    for bound in (0.0, 0.069):
        folder = tmp_path / str(bound)
        cfg = recipe(run=run, model={"min_temp": bound, "temp": 0.07})
        assert commands("--cfg", cfg, f"run.output_dir={folder}").code == 0
        temperature = float(read_weights(folder)["temp"])
        assert temperature != pytest.approx(0.07)
        assert temperature >= bound - 1e-6


# Objectives


@pytest.mark.parametrize("data", ["json", "shards"])
def test_a_batch_of_one_pair_trains_and_is_evaluated(
    commands: Commands, recipe: Recipe, tmp_path: Path, data: str
) -> None:
    run = {**SHORT, "batch_size_train": 1, "batch_size_eval": 1, "test_splits": ["test"]}
    ended = commands("--cfg", recipe(data, run=run), f"run.output_dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.output
    for line in train_lines(tmp_path / "run"):
        assert line["loss_itc"] == pytest.approx(0.0, abs=1e-6)  # there is nothing to choose from
        assert math.isfinite(line["loss_itm"])
        assert math.isfinite(line["loss_lm"])
    assert lines(tmp_path / "run")[-1]["split"] == "test"


def test_a_training_step_reads_nothing_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:

    model, batch = small_model(), part_of(global_batch(8, ids=True), 0, 8)
    batch["num_targets"] = int(batch["text_mask"][:, 1:].sum())  # the trainer counts them before the copy
    reads: Counter[str] = Counter()
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, functools.partialmethod(_counted, original, name, reads))
    model(batch)["loss"].backward()
    monkeypatch.undo()
    # On a CPU, which waits for nothing, targets are found by `nonzero`, once for the whole batch.
    assert reads == {"nonzero": 1}


def _counted(
    tensor: torch.Tensor, original: Any, name: str, reads: Counter[str], *args: Any, **options: Any
) -> Any:
    reads[name] += 1
    return original(tensor, *args, **options)


def test_keys_of_each_picture_are_computed_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:

    pictures: list[int] = []
    original = QFormer.image_keys

    def counted(self: QFormer, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        pictures.append(len(states))
        return original(self, states, *args, **kwargs)

    monkeypatch.setattr(QFormer, "image_keys", counted)
    small_model()(part_of(global_batch(8, ids=True), 0, 8))
    assert pictures == [8]


def test_texts_of_a_batch_are_padded_to_its_longest(data_root: Path) -> None:

    data: Any = build_dataset("scenes", DatasetConfig(**EYES), "train", data_root)
    tokenize = functools.partial(WordPieces("scenes"), max_length=48)
    loader = TrainLoader({"scenes": data}, LoaderConfig(16), tokenize=tokenize)
    widths = []
    for batch in loader.rest_of_epoch():
        assert batch["text_ids"].shape[1] == int(batch["text_mask"].sum(dim=1).max())
        widths.append(batch["text_ids"].shape[1])
    assert max(widths) < 48
    assert len(set(widths)) > 1


# Processes


def test_gradients_are_averaged_with_the_last_micro_batch(tmp_path: Path) -> None:

    parallel = Parallel(RunConfig(max_iters=1, device="cpu"))
    td.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(torch.nn.Linear(2, 2))
        for last in (False, True):
            with parallel.sync_grads(model, last=last):
                assert model.require_backward_grad_sync is last
    finally:
        td.destroy_process_group()


def test_collectives_wait_as_long_as_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda backend, **options: asked.update(options)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init("gloo", RunConfig(max_iters=1).timeout_s)
    assert asked["timeout"].total_seconds() == 1800


def test_a_lost_process_ends_the_others(commands: Commands, recipe: Recipe, tmp_path: Path) -> None:
    run = {**SHORT, "max_iters": 40, "batch_size_train": 8, "save_freq": 1, "timeout_s": 60}
    # SIGALRM ends rank 1 as a crash would; nothing tells rank 0.
    trap = ["signal_at", "blip.engine.runner.Runner.train_step", 3, "before", int(signal.SIGALRM)]
    places = [f"run.output_dir={tmp_path / 'run'}"]
    ended = commands("--cfg", recipe(run=run), *places, world=2, traps=[trap], trapped=1)
    assert ended.codes == [2, -signal.SIGALRM], ended.output
    assert "error: another process of this run has ended, and its own message says why" in ended.output
    assert "Traceback" not in ended.output
    ended = commands("--cfg", recipe(run=run), *places, "run.resume=auto", "run.max_iters=4", world=2)
    assert ended.code == 0, ended.output
    assert "continuing after step 2" in ended.output


# Checkpoints


@pytest.mark.parametrize("mode", ["max", "min"])
def test_any_split_and_either_direction_decide_the_best_checkpoint(
    commands: Commands, recipe: Recipe, tmp_path: Path, mode: str
) -> None:
    run = {**SHORT, "max_iters": 6, "eval_freq": 2, "valid_splits": ["test"], "keep_last": 9}
    more = [f"run.monitor_mode={mode}", f"run.output_dir={tmp_path / 'run'}"]
    assert commands("--cfg", recipe(run=run), *more).code == 0
    scores = {line["step"]: line["r_mean"] for line in lines(tmp_path / "run") if line["split"] == "test"}
    assert list(scores) == [2, 4, 6]
    choose = max if mode == "max" else min
    best = (tmp_path / "run/checkpoints/best").resolve().name
    # Of equal ones the first stays.
    assert best == f"step-{choose(scores, key=lambda step: scores[step]):08d}"


def test_pretrained_weights_are_loaded_where_they_are_named(
    commands: Commands, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    run = {**SHORT, "evaluate": True, "test_splits": ["test"]}
    for number, (switch, code) in enumerate((("true", 0), ("false", 2))):
        more = [f"model.pretrained={trained}", f"model.load_pretrained={switch}"]
        folder = tmp_path / str(number)
        ended = commands("--cfg", recipe(run=run), *more, f"run.output_dir={folder}")
        assert ended.code == code, ended.output
        assert ("tensors loaded from" in ended.output) is (code == 0)


# Evaluation


@pytest.fixture(scope="module")
def trained(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(place / "json.yaml", data_root, "json", run={**SHORT, "max_iters": 6})
    ended = commands("--cfg", recipe, f"run.output_dir={place / 'run'}")
    assert ended.code == 0, ended.output
    return place / "run"


def test_scores_of_uneven_ranks_are_those_of_one_process(
    commands: Commands, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    cfg = recipe(run={**SHORT, "test_splits": ["test"], "batch_size_eval": 5, "k_test": 10})
    found = []
    for world in (1, 3):  # 16 pictures: 6, 5 and 5
        folder = tmp_path / str(world)
        more = [f"model.init_from={trained}", f"run.output_dir={folder}"]
        ended = commands("--cfg", cfg, *more, module="blip.evaluate", world=world)
        assert ended.code == 0, ended.output
        [path] = (folder / "predictions").iterdir()
        found.append((lines(folder), json.loads(path.read_text())))
    (one, alone), (three, together) = found
    assert one == three
    assert [entry["index"] for entry in together] == list(range(16))
    for entry, other in zip(alone, together, strict=True):
        assert entry["score"] == pytest.approx(other["score"], abs=2e-4)
        assert {**entry, "score": 0} == {**other, "score": 0}


def test_every_dataset_of_every_split_is_evaluated(
    commands: Commands, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    cfg = recipe(run={**SHORT, "test_splits": ["test", "val"]})
    content = yaml.safe_load(cfg.read_text())
    content["datasets"]["held_out"] = {**HELD_OUT, **EYES}
    cfg.write_text(yaml.safe_dump(content))
    more = [f"model.init_from={trained}", f"run.output_dir={tmp_path / 'run'}"]
    assert commands("--cfg", cfg, *more, module="blip.evaluate").code == 0
    scores = lines(tmp_path / "run")
    assert [line["split"] for line in scores] == ["test", "val"]
    for line in scores:  # the same pictures under two names
        assert line["scenes/r_mean"] == line["held_out/r_mean"]
    assert len(list((tmp_path / "run/predictions").iterdir())) == 4


def test_evaluating_uses_the_valid_splits_where_there_are_no_others(
    commands: Commands, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    more = [f"model.init_from={trained}", f"run.output_dir={tmp_path / 'run'}", "run.valid_splits=[val]"]
    assert commands("--cfg", recipe(run=SHORT), *more, module="blip.evaluate").code == 0
    assert [line["split"] for line in lines(tmp_path / "run")] == ["val"]


# Data


def test_files_and_shards_train_in_one_run_with_the_ids_of_both(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    cfg = recipe(run={**SHORT, "max_iters": 6, "batch_size_train": 8})
    content = yaml.safe_load(cfg.read_text())
    content["datasets"]["scenes"]["sample_ratio"] = 1
    content["datasets"]["scenes_shards"] = {**EYES, "sample_ratio": 1}
    cfg.write_text(yaml.safe_dump(content))
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        more = [f"run.batch_size_train={8 // world}", f"run.output_dir={folder}"]
        ended = commands("--cfg", cfg, *more, world=world)
        assert ended.code == 0, ended.output
        found.append([line["loss"] for line in train_lines(folder)])
    # Files have texts as ids, "scenes_0"; every step draws from one dataset, the same on all ranks.
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_processors_that_are_not_given_follow_from_what_is(
    commands: Commands, recipe: Recipe, tmp_path: Path
) -> None:
    cfg = recipe(run={**SHORT, "test_splits": ["test"]})
    content = yaml.safe_load(cfg.read_text())
    for section in ({}, {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 32}}}):
        content["datasets"]["scenes"] = section
        cfg.write_text(yaml.safe_dump(content))
        ended = commands("--cfg", cfg, f"run.output_dir={tmp_path / f'run-{len(section)}'}")
        assert ended.code == 0, ended.output


# Configuration


def test_the_recipe_of_stage_1_has_all_its_data_seen_alike() -> None:
    recipe = yaml.safe_load((ROOT / "configs/blip2/pretrain_stage1.yaml").read_text())
    sets = recipe["datasets"]
    assert list(sets) == [
        "coco_caption",
        "vg_caption",
        "conceptual_caption_3m",
        "conceptual_caption_12m",
        "sbu_caption",
        "laion400M",
    ]
    for section in sets.values():
        assert section["vis_processor"]["train"] == {"name": "blip2_image_train", "image_size": 224}
        assert section["text_processor"]["train"] == {"name": "blip_caption"}
    assert sum(section["sample_ratio"] for section in sets.values()) == pytest.approx(130, abs=1.5)


def test_a_name_is_taken_once_and_importing_again_is_no_mistake() -> None:

    registry: Registry[Any] = Registry("model", "blip.models")
    first, again, other = (type(name, (), {}) for name in ("First", "First", "Other"))
    registry.register("mine")(first)
    assert registry.register("mine")(again) is again  # the module was imported once more
    with pytest.raises(
        ConfigError, match=r"^model name 'mine' is already registered by .*First; choose another"
    ):
        registry.register("mine")(other)
