"""BLIP's momentum training through the commands: resumed bit by bit, in two processes, scored by retrieval.

LAVIS's checkpoints lack the momentum twin, and cannot be loaded again for the lack of it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from blip.weights import read_weights, save_safetensors
from tests.e2e.runs import EYES, RUN, Commands, Ended, contents, differences, lines, train_lines

STEPS = 12
MODEL: dict[str, Any] = {
    "arch": "blip_pretrain",
    "model_type": "base",
    "vit_init_from": None,
    "image_size": 32,
    "vit": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64},
    "med": {
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 64,
        "max_positions": 48,
        "init_from": None,
    },
    "embed_dim": 16,
    "max_txt_len": 32,
    "tokenizer": "scenes",
    "dropout": 0.1,
    "queue_size": 50,
    "momentum": 0.9,
}
RETRIEVAL = {"arch": "blip_retrieval", "model_type": "flickr", "vit_grad_ckpt": False}
# 128 captions: the eleventh batch has 8.
UNEVEN = {"batch_size_train": 12, "drop_last": False}
Recipe = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """A way to train."""

    name: str
    workers: int = 0
    world: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("pretrain", run=UNEVEN),
    Case("pretrain-workers-accumulation", workers=2, run={"accum_grad_iters": 2, "batch_size_train": 8}),
    Case("retrieval-workers", workers=2, model=RETRIEVAL, run={**UNEVEN, "task": "retrieval"}),
    Case("pretrain-two-processes", world=2, run={"batch_size_train": 7, "drop_last": False}),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Recipe:
    """Writes a recipe: `recipe(model={...}, run={...})`."""
    folder, count = tmp_path_factory.mktemp("recipes"), iter(range(1000))

    def write(model: dict[str, Any] | None = None, run: dict[str, Any] | None = None) -> Path:
        sections = {
            "model": {**MODEL, **(model or {})},
            "datasets": {"scenes": EYES},
            "run": {**RUN, "max_iters": STEPS, "data_root": str(data_root), **(run or {})},
        }
        path = folder / f"{next(count)}.yaml"
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="module")
def start(commands: Commands, recipe: Recipe) -> Callable[..., Ended]:
    """Starts, or goes on with, a run of a case."""

    def begin(case: Case, folder: Path, *more: str, **how: Any) -> Ended:
        path = recipe(case.model, {**case.run, "num_workers": case.workers})
        places = [f"run.output_dir={folder}", "run.resume=auto"]
        return commands("--cfg", path, *places, *more, world=case.world, **how)

    return begin


@pytest.fixture(scope="module")
def straight(start: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder of an uninterrupted run of a case."""
    place, done = tmp_path_factory.mktemp("straight"), set()

    def run(case: Case) -> Path:
        folder = place / case.name
        if case.name not in done:
            ended = start(case, folder)
            assert ended.code == 0, ended.output
            done.add(case.name)
        return folder

    return run


def weights_at(folder: Path, name: str = "last") -> dict[str, Tensor]:
    return read_weights((folder / "checkpoints" / name).resolve() / "model.safetensors")


# Resumed


@pytest.mark.multi
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_was_stopped_and_killed_is_the_uninterrupted_one(
    case: Case, start: Callable[..., Ended], straight: Callable[[Case], Path], tmp_path: Path
) -> None:
    """Weights, twin, queue, optimizer, figures, predictions and scores, bit by bit."""
    folder = tmp_path / "run"
    stop = ["signal_at", "torch.optim.AdamW.step", 5, "after", signal.SIGTERM.value]
    assert start(case, folder, traps=[stop], trapped=-1).code == 3
    kill = ["die_at", "torch.optim.AdamW.step", 4, "after"]
    ended = start(case, folder, traps=[kill], trapped=-1)
    assert set(ended.codes) == {-signal.SIGKILL}
    assert "continuing after step 5" in ended.output
    ended = start(case, folder)
    assert ended.code == 0, ended.output
    assert "continuing after step 8" in ended.output
    found = contents(folder)
    assert differences(found, contents(straight(case))) == []
    assert {"last.queue.image", "last.queue.text", "last.queue.ids", "last.queue.pointer"} <= set(found)
    assert any(name.startswith("last.twin.vision.") for name in found)


def test_twin_and_queue_of_a_checkpoint_are_of_this_run(straight: Callable[[Case], Path]) -> None:
    """Else equality would say little: both have moved with every step."""
    for case, rows in ((CASES[0], 10 * 12 + 8 + 12), (CASES[1], 12 * 16)):
        folder = straight(case)
        before, last = weights_at(folder, "step-00000010"), weights_at(folder)
        assert int(last["queue.pointer"]) == rows % 50
        twin = [name for name in last if name.startswith("twin.")]
        still = ("key.bias", "qkv.bias")  # have no gradient but rounding
        for name in (name for name in twin if not name.endswith(still)):
            assert not torch.equal(last[name], before[name]), name
            assert not torch.equal(last[name], last[name.removeprefix("twin.")]), name
        assert not torch.equal(last["queue.text"], before["queue.text"])


def test_picture_numbers_of_retrieval_are_kept_and_those_of_pre_training_are_none(
    straight: Callable[[Case], Path],
) -> None:
    assert set(weights_at(straight(CASES[0]))["queue.ids"].tolist()) == {-100}
    ids = weights_at(straight(CASES[2]))["queue.ids"].tolist()
    assert -100 not in ids
    assert 1 < len(set(ids)) <= 50


def test_a_checkpoint_without_the_twin_is_not_continued(
    start: Callable[..., Ended], straight: Callable[[Case], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert start(CASES[0], folder, "run.max_iters=2").code == 0
    path = (folder / "checkpoints" / "last").resolve() / "model.safetensors"
    save_safetensors({k: v for k, v in read_weights(path).items() if not k.startswith("twin.")}, path)
    ended = start(CASES[0], folder, "run.max_iters=4", f"run.resume={path.parent}")
    assert ended.code == 2
    assert "model.safetensors" in ended.refusal()


# A step that is skipped


def test_a_skipped_step_changes_neither_twin_nor_queue(start: Callable[..., Ended], tmp_path: Path) -> None:
    """Nor what follows: the next step is one of the same weights."""
    case, folder, dumps = CASES[0], tmp_path / "run", tmp_path / "dumps"
    dumps.mkdir()
    traps = [["poison", 3, 4], ["dump_weights", str(dumps)]]
    ended = start(case, folder, "run.max_iters=7", "run.test_splits=[]", traps=traps)
    assert ended.code == 0, ended.output
    assert train_lines(folder)[4]["skipped"] == 2
    states = [torch.load(dumps / f"step-{step}.pt") for step in range(1, 8)]
    for one, other, same in ((2, 3, True), (2, 4, True), (4, 5, False)):
        changed = [name for name, value in states[one].items() if not torch.equal(value, states[other][name])]
        assert (changed == []) == same
    assert int(states[6]["queue.pointer"]) == 5 * 12 % 50


# Scores


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_both_tasks_score_by_similarity_and_by_matching(case: Case, straight: Callable[[Case], Path]) -> None:
    folder = straight(case)
    scores = [line for line in lines(folder) if line["split"] != "train"]
    assert [(line["split"], line["step"]) for line in scores] == [
        *(("val", step) for step in (4, 8, 12)),
        ("test", scores[-1]["step"]),
    ]
    for line in scores:
        for prefix in ("", "itc_"):
            recalls = [
                line[f"{prefix}{name}"] for name in ("txt_r1", "txt_r5", "txt_r10", "img_r10", "r_mean")
            ]
            assert all(0 <= value <= 100 for value in recalls)
        assert line["txt_r1"] <= line["txt_r5"] <= line["txt_r10"]
    [path] = (folder / "predictions").glob("test-*")
    assert len(json.loads(path.read_text())) == 16


def test_evaluating_a_run_gives_its_scores(
    commands: Commands, recipe: Recipe, straight: Callable[[Case], Path], tmp_path: Path
) -> None:
    trained = straight(CASES[0])
    more = [f"model.init_from={trained}", f"run.output_dir={tmp_path / 'run'}"]
    ended = commands("--cfg", recipe(), *more, module="blip.evaluate")
    assert ended.code == 0, ended.output
    [again] = lines(tmp_path / "run")
    [first] = [line for line in lines(trained) if line["split"] == "test"]
    assert {**again, "step": 0} == {**first, "step": 0}


def test_retrieval_starts_from_pre_training_with_its_twin_and_queue(
    commands: Commands, recipe: Recipe, straight: Callable[[Case], Path], tmp_path: Path
) -> None:
    trained, dumps = straight(CASES[0]), tmp_path / "dumps"
    dumps.mkdir()
    run = {"task": "retrieval", "max_iters": 1, "init_lr": 1e-30, "min_lr": 0, "test_splits": []}
    more = [f"model.init_from={trained}", f"run.output_dir={tmp_path / 'run'}", "model.momentum=1.0"]
    traps = [["dump_weights", str(dumps)]]
    ended = commands("--cfg", recipe(RETRIEVAL, {**run, **UNEVEN}), *more, traps=traps)
    assert ended.code == 0, ended.output
    given, own = read_weights(trained / "model" / "model.safetensors"), torch.load(dumps / "step-1.pt")
    kept = list(range(12, 50))  # the pointer starts anew, as in LAVIS, and numbers of pictures are forgotten
    assert (own["queue.ids"][kept] == -100).all()
    for name, value in own.items():
        if name in ("queue.image", "queue.text"):
            assert torch.equal(value[kept], given[name][kept])
        elif not name.startswith("queue."):
            torch.testing.assert_close(value, given[name], atol=1e-6, rtol=1e-6, msg=name)


# Processes


@pytest.mark.multi
def test_two_processes_that_share_candidates_take_the_steps_of_one(
    commands: Commands, recipe: Recipe, straight: Callable[[Case], Path], tmp_path: Path
) -> None:
    """From weights that tell pictures apart, with repeated pictures and a last batch of 8."""
    shared = {"itc_all_rank": True, "negative_all_rank": True, "image_id_targets": True, "dropout": 0.0}
    found = []
    for world in (1, 2):
        run = {
            **UNEVEN,
            "batch_size_train": 18 // world,
            "max_iters": 9,
            "test_splits": [],
            "valid_splits": [],
        }
        folder = tmp_path / str(world)
        more = [f"model.init_from={straight(CASES[0])}", f"run.output_dir={folder}"]
        ended = commands("--cfg", recipe(shared, {**run, "save_freq": None}), *more, world=world)
        assert ended.code == 0, ended.output
        found.append((train_lines(folder), weights_at(folder)))
    (one, alone), (two, together) = found
    names = ("loss", "loss_itc", "loss_itm", "loss_lm", "grad_norm", "itc_acc", "itm_acc", "temp", "alpha")
    assert [line["epoch"] for line in one] == [0] * 8 + [1]
    for mine, its in zip(two, one, strict=True):
        assert {k: mine[k] for k in names} == pytest.approx({k: its[k] for k in names}, rel=1e-5, abs=1e-5)
    for name in ("queue.image", "queue.text"):
        torch.testing.assert_close(together[name], alone[name], atol=1e-4, rtol=1e-3)
    assert torch.equal(together["queue.ids"], alone["queue.ids"])
    assert torch.equal(together["queue.pointer"], alone["queue.pointer"])


@pytest.mark.multi
@pytest.mark.parametrize("world", [1, 2])
def test_a_last_batch_of_one_and_batches_larger_than_the_queue_train(
    commands: Commands, recipe: Recipe, tmp_path: Path, world: int
) -> None:
    """The last batch of an epoch has one row; with two processes 2 rows for one and 1 for the other."""
    run = {**UNEVEN, "batch_size_train": 12 // world, "max_iters": 6, "test_splits": [], "valid_splits": []}
    for arch in ({}, RETRIEVAL):
        folder = tmp_path / f"{world}-{len(arch)}"
        more = [f"datasets.scenes.max_samples={25 if world == 1 else 27}"]
        more += ["model.queue_size=5", f"run.output_dir={folder}"]
        ended = commands("--cfg", recipe(arch, run), *more, world=world)
        assert ended.code == 0, ended.output
        assert [line["step"] for line in train_lines(folder)] == list(range(1, 7))
        assert not [line for line in train_lines(folder) if "skipped" in line]
