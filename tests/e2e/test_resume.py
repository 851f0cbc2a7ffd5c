"""Stopped at any moment and continued, a run is the uninterrupted one bit for bit; or it says why not.

LAVIS restarts at the last epoch's end, one step late, with other batches, other dropout and without its best
score; half a checkpoint is loaded; and a stop signal loses what was done since.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from blip.weights import read_weights, save_safetensors
from tests.e2e.runs import (
    Commands,
    Ended,
    contents,
    differences,
    flat,
    left_alive,
    lines,
    train_lines,
    write_recipe,
)


@dataclass(frozen=True)
class Case:
    """A way to train."""

    data: str
    workers: int
    world: int
    model: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.data}-{self.workers}workers-{self.world}processes"


DROPOUT = {"dropout": 0.1}
MEAN = {"accum_grad_iters": 2, "batch_size_train": 4}
CACHED = {**MEAN, "accum_mode": "cached"}
CASES = [
    Case("json", 0, 1, DROPOUT, {"drop_last": False, "batch_size_train": 12, "keep_last": 3}),
    Case("json", 2, 1, DROPOUT, {"ema_decay": 0.9}),
    Case("shards", 0, 1, DROPOUT, {**MEAN, "batch_size_train": 8}),
    Case("shards", 2, 1, DROPOUT, {**CACHED, "batch_size_train": 8}),
    Case("json", 0, 2, DROPOUT, CACHED),
    Case("json", 2, 2, DROPOUT, {"ema_decay": 0.9, "batch_size_train": 8}),
    Case("shards", 0, 2, {}, {"batch_size_train": 8, "log_freq": 3}),
    Case("shards", 2, 2, DROPOUT, MEAN),
]


class Workshop:
    """Recipes of the cases, and what uninterrupted runs of them leave behind."""

    def __init__(self, commands: Commands, folder: Path, data_root: Path) -> None:
        self.commands, self.folder, self.data_root = commands, folder, data_root
        self._done: dict[str, tuple[dict[str, Any], float]] = {}

    def start(self, case: Case, run_folder: Path, *more: str, **how: Any) -> Ended:
        """Start, or go on with, a run."""
        recipe = self.folder / f"{case}.yaml"
        run = {**case.run, "num_workers": case.workers}
        write_recipe(recipe, self.data_root, case.data, model=case.model, run=run)
        places = [f"run.output_dir={run_folder}", "run.resume=auto"]
        return self.commands("--cfg", recipe, *places, *more, world=case.world, **how)

    def straight(self, case: Case, *more: str) -> tuple[dict[str, Any], float]:
        """`contents` of the uninterrupted run, and how long it took."""
        key = " ".join([str(case), *more])
        if key not in self._done:
            folder = self.folder / key.replace("/", "-")
            began = time.perf_counter()
            ended = self.start(case, folder, *more)
            assert ended.code == 0, ended.output
            self._done[key] = contents(folder), time.perf_counter() - began
        return self._done[key]

    def finish(self, case: Case, folder: Path, *more: str) -> None:
        """Continue to the end, and see that nothing tells that the run was interrupted."""
        ended = self.start(case, folder, *more)
        assert ended.code == 0, ended.output
        wanted, _ = self.straight(case, *more)
        assert differences(contents(folder), wanted) == []
        counts = Counter((line["split"], line["step"]) for line in lines(folder))
        assert set(counts.values()) == {1}
        assert list(folder.rglob(".partial-*")) == []


@pytest.fixture(scope="module")
def workshop(commands: Commands, tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Workshop:
    return Workshop(commands, tmp_path_factory.mktemp("workshop"), data_root)


@pytest.fixture(scope="module")
def done(workshop: Workshop) -> Path:
    """The folder of a complete run of the first case; copy it."""
    workshop.straight(CASES[0])
    return workshop.folder / str(CASES[0])


# Killed

SAVER = "blip.engine.checkpoint"
MOMENTS: list[tuple[str, int, tuple[str, ...]]] = [
    # What is trapped, up to which of its calls, and at which moments of a call.
    ("torch.optim.AdamW.step", 9, ("before", "after")),
    ("torch.Tensor.backward", 9, ("before", "after")),
    ("blip.data.loader.TrainLoader.__next__", 9, ("after",)),
    (f"{SAVER}.save_safetensors", 5, ("before", "half")),
    (f"{SAVER}_files.write_tensors", 9, ("half", "after")),
    (f"{SAVER}_files.point", 6, ("before", "after")),
    (f"{SAVER}.Checkpoints.mark_best", 1, ("before", "after")),
    ("os.rename", 8, ("before", "after")),
    ("os.replace", 16, ("before", "after")),
    ("shutil.rmtree", 3, ("before",)),
    ("blip.tasks.retrieval.Retrieval._rerank", 3, ("before", "after")),
    ("blip.engine.tracker.Tracker.predictions", 3, ("after",)),
    ("line", 12, ("half",)),
    ("blip.models.base.BlipModel.save_pretrained", 1, ("before", "after")),
    ("blip.engine.runner.write_report", 1, ("before", "after")),
]
ON_ALL_RANKS = {target for target, _, _ in MOMENTS[:3]} | {"blip.tasks.retrieval.Retrieval._rerank"}


def trap(target: str, call: int, moment: str) -> list[Any]:
    return ["die_within_line", call] if target == "line" else ["die_at", target, call, moment]


def die_once(workshop: Workshop, case: Case, folder: Path, rng: random.Random, *more: str) -> bool:
    """One start that is to be killed at a random moment; whether it was, for it may have ended before."""
    _, seconds = workshop.straight(case, *more)
    if rng.random() < 1 / 3:
        ended = workshop.start(case, folder, *more, kill_after=rng.uniform(0.2, 0.9) * seconds)
    else:
        target, calls, moments = rng.choice(MOMENTS)
        # What a continued run has left to do is less.
        most = min(calls, 2) if (folder / "metrics.jsonl").exists() else calls
        some = trap(target, rng.randint(1, most), rng.choice(moments))
        rank = rng.randrange(case.world) if target in ON_ALL_RANKS else 0
        ended = workshop.start(case, folder, *more, traps=[some], trapped=rank)
    killed = -signal.SIGKILL in ended.codes
    assert killed or ended.code == 0, ended.output
    return killed


def kill_and_resume(workshop: Workshop, case: Case, folder: Path, kills: int, *more: str) -> None:
    rng = random.Random(f"{case} {kills}")
    killed = 0
    for _ in range(20 * kills):
        killed += die_once(workshop, case, folder, rng, *more)
        if killed == kills:
            break
    assert killed == kills
    workshop.finish(case, folder, *more)


@pytest.mark.multi
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_killed_at_random_moments_and_resumed_is_the_uninterrupted_one(
    workshop: Workshop, case: Case, tmp_path: Path
) -> None:
    kill_and_resume(workshop, case, tmp_path / "run", 2)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_killed_20_times_and_resumed_is_the_uninterrupted_one(
    workshop: Workshop, case: Case, tmp_path: Path
) -> None:
    kill_and_resume(workshop, case, tmp_path / "run", 20, "run.max_iters=40")


def test_a_run_killed_at_every_kind_of_moment_in_turn_is_the_uninterrupted_one(
    workshop: Workshop, tmp_path: Path
) -> None:
    for target, calls, moments in MOMENTS:
        some = trap(target, min(2, calls), moments[0])
        ended = workshop.start(CASES[0], tmp_path / "run", traps=[some])
        assert ended.codes == [-signal.SIGKILL], f"{target} was not reached\n{ended.output}"
    workshop.finish(CASES[0], tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.multi
def test_no_loader_process_outlives_a_killed_trainer(workshop: Workshop, tmp_path: Path) -> None:
    groups = []
    for case in (CASES[1], CASES[7]):  # with loader processes
        some = trap("torch.optim.AdamW.step", 3, "before")
        ended = workshop.start(case, tmp_path / str(case), traps=[some])
        assert -signal.SIGKILL in ended.codes
        groups += ended.pids
    deadline = time.monotonic() + 60
    while left_alive(groups) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_alive(groups) == []


def test_what_was_skipped_is_counted_and_listed_once_over_restarts(
    workshop: Workshop, tmp_path: Path, data_root: Path
) -> None:
    """Cut pictures and non-finite steps, in a run that is killed three times."""
    root = tmp_path / "harmed"
    shutil.copytree(data_root, root)
    for number in (3, 20, 41):
        path = root / f"scenes/images/train/{number:06d}.png"
        path.write_bytes(path.read_bytes()[:300])
    case = CASES[1]
    more = [f"run.data_root={root}", "run.max_bad_ratio=0.5"]
    poisoned: list[Any] = ["poison", 3, 4]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert workshop.start(case, straight, *more, traps=[poisoned]).code == 0
    for step in (4, 5, 3):  # of those that are taken
        some = trap("torch.optim.AdamW.step", step, "before")
        ended = workshop.start(case, killed, *more, traps=[poisoned, some])
        assert ended.codes == [-signal.SIGKILL], ended.output
    assert workshop.start(case, killed, *more, traps=[poisoned]).code == 0
    assert contents(straight)["rank-00000.pt.skips.bad.scenes.truncated_image"] >= 6
    assert differences(contents(killed), contents(straight)) == []
    assert [line.get("skipped") for line in train_lines(killed)][3:6] == [1, 2, 2]
    for name in ("skipped.jsonl", "events.jsonl"):
        assert (killed / name).read_text().splitlines() == (straight / name).read_text().splitlines()


def test_a_run_with_a_tower_from_a_file_is_resumed_beside_that_tower_only(
    workshop: Workshop, tmp_path: Path, done: Path
) -> None:
    towers = [tmp_path / "tower.safetensors", tmp_path / "other.safetensors"]
    weights = read_weights(done / "model" / "model.safetensors")
    save_safetensors(weights, towers[0])
    changed = next(name for name in weights if name.startswith("vision."))
    save_safetensors({**weights, changed: weights[changed] + 1}, towers[1])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    ours, other = ([f"model.vit_init_from={tower}", "model.vit_train_steps=0"] for tower in towers)
    case = CASES[0]
    assert workshop.start(case, straight, *ours).code == 0
    for moment in (trap("torch.optim.AdamW.step", 7, "after"), trap("os.rename", 2, "before")):
        assert workshop.start(case, killed, *ours, traps=[moment]).codes == [-signal.SIGKILL]
    assert "another frozen 'vision'" in workshop.start(case, killed, *other).refusal()
    assert workshop.start(case, killed, *ours).code == 0
    assert differences(contents(killed), contents(straight)) == []
    saved = read_weights(killed / "checkpoints" / "last" / "model.safetensors")
    assert not [name for name in saved if name.startswith("vision.")]


# Asked to stop


def test_a_stop_signal_saves_ends_with_code_3_and_loses_nothing(workshop: Workshop, tmp_path: Path) -> None:
    case, folder = CASES[0], tmp_path / "run"
    done = 0
    for name, steps in (("SIGTERM", 3), ("SIGINT", 2), ("SIGUSR1", 4)):
        number = getattr(signal, name).value
        some = ["signal_at", "torch.optim.AdamW.step", steps, "after", number]
        ended = workshop.start(case, folder, traps=[some])
        done += steps
        assert ended.code == 3
        assert f"stopped by {name} after step {done}; continue with run.resume=auto" in ended.output
        assert (folder / "checkpoints" / "last").resolve().name == f"step-{done:08d}"
    workshop.finish(case, folder)


@pytest.mark.multi
def test_a_stop_signal_to_one_rank_stops_all(workshop: Workshop, tmp_path: Path) -> None:
    case, folder = CASES[5], tmp_path / "run"
    some = ["signal_at", "torch.optim.AdamW.step", 3, "before", signal.SIGTERM.value]
    ended = workshop.start(case, folder, traps=[some], trapped=1)
    assert ended.codes == [3, 3], ended.output
    assert (folder / "checkpoints" / "last").resolve().name == "step-00000003"
    workshop.finish(case, folder)


@pytest.mark.parametrize("call", [1, 4], ids=["val", "test"])
def test_a_stop_signal_during_an_evaluation_loses_nothing(
    workshop: Workshop, tmp_path: Path, call: int
) -> None:
    case, folder = CASES[0], tmp_path / "run"
    target = "blip.tasks.retrieval.Retrieval._rerank"
    ended = workshop.start(case, folder, traps=[["signal_at", target, call, "before", signal.SIGUSR1.value]])
    assert ended.code == (3 if call == 1 else 0), ended.output
    workshop.finish(case, folder)


def test_a_signal_from_outside_stops_the_command(workshop: Workshop, tmp_path: Path) -> None:
    case, folder = CASES[1], tmp_path / "run"
    workshop.straight(case)  # writes the recipe
    recipe = workshop.folder / f"{case}.yaml"
    command = [sys.executable, "-m", "blip.train", "--cfg", str(recipe), f"run.output_dir={folder}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "run.max_iters=100000"], stderr=log, start_new_session=True)
    while process.poll() is None and not (folder / "checkpoints" / "last").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, loader processes included
    assert process.wait(timeout=120) == 3, (tmp_path / "log").read_text()
    steps = [line["step"] for line in train_lines(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert (folder / "checkpoints" / "last").resolve().name == f"step-{steps[-1]:08d}"
    assert "Traceback" not in (tmp_path / "log").read_text()


# What is resumed, and what is refused


@pytest.fixture
def run_folder(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run", symlinks=True))


def everything(folder: Path) -> dict[str, bytes]:
    """All files but those that tell times and places."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    skipped = ("config.yaml", "env.json", "report.html", "metrics.jsonl")
    return {name: path.read_bytes() for name, path in files.items() if name not in skipped}


def test_a_finished_run_that_is_resumed_stays_as_it_is(workshop: Workshop, run_folder: Path) -> None:
    before, figures = everything(run_folder), lines(run_folder)
    assert workshop.start(CASES[0], run_folder).code == 0
    assert everything(run_folder) == before
    assert lines(run_folder) == figures


def test_a_run_is_made_longer_by_resuming_it(workshop: Workshop, tmp_path: Path) -> None:
    longer, straight = tmp_path / "longer", tmp_path / "straight"
    more = ["run.lr_sched=constant_lr", "run.eval_freq=100"]
    assert workshop.start(CASES[0], longer, *more, "run.max_iters=5").code == 0
    assert workshop.start(CASES[0], longer, *more, "run.max_iters=8").code == 0
    assert workshop.start(CASES[0], straight, *more, "run.max_iters=8").code == 0
    assert train_lines(longer) == train_lines(straight)


def test_a_folder_with_a_run_is_not_overwritten_unless_asked(workshop: Workshop, run_folder: Path) -> None:
    before = everything(run_folder)
    message = workshop.start(CASES[0], run_folder, "run.resume=null").refusal()
    assert "already holds a run" in message
    assert "run.resume=auto" in message
    assert "run.overwrite=true" in message
    assert everything(run_folder) == before
    (run_folder / "notes.txt").write_text("mine")
    ended = workshop.start(CASES[0], run_folder, "run.resume=null", "run.overwrite=true", "run.max_iters=2")
    assert ended.code == 0
    assert [line["step"] for line in train_lines(run_folder)] == [1, 2]
    assert not (run_folder / "checkpoints" / "step-00000012").exists()
    assert (run_folder / "notes.txt").read_text() == "mine"


@pytest.mark.multi
def test_another_number_of_processes_is_refused(workshop: Workshop, run_folder: Path) -> None:
    case = Case("json", 0, 2, CASES[0].model, {**CASES[0].run, "batch_size_train": 6})
    message = workshop.start(case, run_folder).refusal()
    assert "saved by 1 processes and this run has 2" in message
    assert "model.init_from" in message


def test_a_checkpoint_of_another_model_is_refused(workshop: Workshop, run_folder: Path) -> None:
    message = workshop.start(CASES[0], run_folder, "model.qformer.mlp_dim=96").refusal()
    assert "step-00000012" in message
    message = workshop.start(CASES[0], run_folder, "model.arch=blip2_image_text_matching").refusal()
    assert "model.arch" in message


def test_another_batch_size_is_refused(workshop: Workshop, run_folder: Path) -> None:
    message = workshop.start(CASES[0], run_folder, "run.batch_size_train=10").refusal()
    assert "global batch is 10, was 12" in message


def test_half_a_checkpoint_is_never_loaded(workshop: Workshop, run_folder: Path) -> None:
    place = run_folder / "checkpoints"
    assert steps_saved(run_folder)[-3:] == [8, 10, 12]
    cut, without = place / "step-00000012", place / "step-00000010"
    os.truncate(cut / "optimizer.pt", (cut / "optimizer.pt").stat().st_size - 100)
    (without / "state.json").unlink()
    for path, reason in ((place / "last", "optimizer.pt has"), (without, "no state.json")):
        message = workshop.start(CASES[0], run_folder, f"run.resume={path}").refusal()
        assert path.resolve().name in message
        assert reason in message
    ended = workshop.start(CASES[0], run_folder)
    assert ended.code == 0
    assert "continuing after step 8" in ended.output
    for path in (cut, without):
        assert f"{path}' is no complete checkpoint" in ended.output
    assert differences(contents(run_folder), workshop.straight(CASES[0])[0]) == []


@pytest.mark.parametrize("name", ["model.safetensors", "rank-00000.pt", "state.json"])
def test_a_checkpoint_that_lacks_a_part_is_passed_over(
    workshop: Workshop, run_folder: Path, name: str
) -> None:
    newest = (run_folder / "checkpoints" / "last").resolve()
    if name == "state.json":
        os.truncate(newest / name, 100)
    else:
        (newest / name).unlink()
    ended = workshop.start(CASES[0], run_folder, "run.max_iters=10")
    assert ended.code == 0
    assert "continuing after step 10" in ended.output


def test_a_damaged_checkpoint_of_full_size_is_refused(workshop: Workshop, run_folder: Path) -> None:
    newest = (run_folder / "checkpoints" / "last").resolve()
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    message = workshop.start(CASES[0], run_folder, f"run.resume={newest}").refusal()
    assert "model.safetensors is not what was written" in message


def test_an_earlier_checkpoint_can_be_resumed(workshop: Workshop, run_folder: Path) -> None:
    earlier = run_folder / "checkpoints" / "step-00000010"
    ended = workshop.start(CASES[0], run_folder, f"run.resume={earlier}")
    assert ended.code == 0
    assert "continuing after step 10" in ended.output
    assert differences(contents(run_folder), workshop.straight(CASES[0])[0]) == []


# Which checkpoints there are


def steps_saved(folder: Path) -> list[int]:
    found = (folder / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def test_the_newest_checkpoints_and_the_best_are_kept(workshop: Workshop, tmp_path: Path) -> None:
    more = ["run.keep_last=3", "run.monitor=itc_r_mean", "run.save_freq=1"]
    ended = workshop.start(CASES[0], tmp_path / "run", *more)
    assert ended.code == 0
    scores = {line["step"]: line["itc_r_mean"] for line in lines(tmp_path / "run") if line["split"] == "val"}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert steps_saved(tmp_path / "run") == sorted({best, 10, 11, 12})
    assert (tmp_path / "run/checkpoints/best").resolve().name == f"step-{best:08d}"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_test_split_is_scored_and_exported_with_the_best_checkpoint(
    workshop: Workshop, tmp_path: Path, mode: str
) -> None:
    folder = tmp_path / "run"
    more = ["run.eval_freq=2", "run.monitor=itc_txt_r5", f"run.monitor_mode={mode}", "run.keep_last=1"]
    assert workshop.start(CASES[0], folder, *more).code == 0
    scores = {line["step"]: line["itc_txt_r5"] for line in lines(folder) if line["split"] == "val"}
    sign = 1 if mode == "max" else -1
    best = max(scores, key=lambda step: (sign * scores[step], -step))
    [test] = [line for line in lines(folder) if line["split"] == "test"]
    assert test["step"] == best
    exported, at_best = (
        flat(read_weights(place / "model.safetensors"), "")
        for place in (folder / "model", folder / "checkpoints" / "best")
    )
    assert differences(exported, at_best) == []


def test_checkpoints_are_saved_by_the_clock(workshop: Workshop, tmp_path: Path) -> None:
    """A clock that runs 1000 times faster makes every step last longer than the minutes given."""
    more = ["run.save_freq=null", "run.eval_freq=100", "run.keep_last=20"]
    straight, clocked = tmp_path / "straight", tmp_path / "clocked"
    assert workshop.start(CASES[0], straight, *more).code == 0
    assert steps_saved(straight) == [12]
    ended = workshop.start(CASES[0], clocked, *more, "run.save_minutes=0.01", traps=[["slow_clock", 1000.0]])
    assert ended.code == 0
    assert steps_saved(clocked) == list(range(1, 13))
    assert train_lines(clocked) == train_lines(straight)


def test_a_resumed_run_keeps_its_optimizer_moments(run_folder: Path) -> None:
    """The checkpoint holds both moments of every trained parameter, none of the frozen tower."""
    state = torch.load(run_folder / "checkpoints" / "last" / "optimizer.pt", weights_only=True)["optimizer"]
    names = {
        number: name
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    with_moments = {names[number] for number in state["state"]}
    assert not [name for name in with_moments if name.startswith("vision.")]
    assert with_moments == {name for name in names.values() if not name.startswith("vision.")}
