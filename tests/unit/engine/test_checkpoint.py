"""Facts about checkpoints: complete or absent, bit for bit, refused where they do not fit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from blip import atomic
from blip.config.schema import RunConfig
from blip.engine import checkpoint, checkpoint_files
from blip.engine.checkpoint import Checkpoints, fingerprint, latest, load_model
from blip.engine.optim import Ema, Schedule, build_optimizer
from blip.engine.rng import capture_rng, restore_rng
from blip.errors import CheckpointError
from blip.weights import find_weights, read_weights


class Settings:
    arch = "toy"
    model_type = "base"


class Toy(nn.Module):
    """A model with a trained part, a momentum twin that has no gradient, a queue, and a frozen tower."""

    config = Settings()
    queue: torch.Tensor

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.tower = nn.Linear(3, 3).requires_grad_(False)
        torch.manual_seed(seed)
        self.head = nn.Linear(width, 2)
        self.twin = nn.Linear(width, 2).requires_grad_(False)
        self.register_buffer("queue", torch.randn(5))
        self.register_buffer("queue_ptr", torch.tensor(3))

    def frozen_parts(self) -> dict[str, str]:
        return {"tower.": "tower.pth"}

    def state_to_save(self) -> dict[str, torch.Tensor]:
        return {n: t for n, t in self.state_dict().items() if not n.startswith("tower.")}


class Position:
    """Where a loader stands."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Run:
    """All that a training has, with random content after `train`."""

    def __init__(self, folder: Path, seed: int = 0, keep_last: int = 2) -> None:
        self.config = RunConfig(max_iters=100, warmup_steps=10)
        self.model = Toy(seed)
        self.optimizer = build_optimizer(self.model, self.config)
        self.progress = Position(step=0, best=None, window={"loss": 0.1})
        self.stateful: dict[str, Any] = {
            "optimizer": self.optimizer,
            "ema": Ema(self.model, 0.9),
            "schedule": Schedule(self.optimizer, self.config, 100, 10),
            "progress": self.progress,
        }
        self.per_rank: dict[str, Any] = {"loader": Position(epoch=0, offset=0)}
        self.checkpoints = Checkpoints(folder, keep_last)

    @property
    def step(self) -> int:
        return self.progress.state["step"]

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model.head(torch.randn(8, 4)).square().mean().backward()
            self.optimizer.step()
            self.stateful["ema"].update()
            self.stateful["schedule"].step()
            self.model.queue.add_(float(np.random.rand()) + random.random())
            self.progress.state = {**self.progress.state, "step": self.step + 1, "best": 0.1 * self.step}
            self.per_rank["loader"].state = {"epoch": 0, "offset": 8 * self.step}

    def save(self) -> Path:
        return self.checkpoints.save(self.step, self.model, self.stateful, self.per_rank)

    def resume(self, resume: str = "auto") -> int:
        folder = self.checkpoints.find(resume)
        assert folder is not None
        return self.checkpoints.restore(folder, self.model, self.stateful, self.per_rank)

    def everything(self) -> str:
        """All state as one text; equal texts mean equal bits."""
        torch.set_printoptions(profile="full", precision=20)
        states = {n: s.state_dict() for n, s in {**self.stateful, **self.per_rank}.items()}
        return repr((self.model.state_dict(), states, capture_rng()))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text
    return text


# What is saved, and that it comes back


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """LAVIS saves no RNG, position, schedule, best metric or momentum twin, and resumes a step late."""
    straight = Run(tmp_path)
    torch.manual_seed(1)
    straight.train(3)
    straight.save()
    straight.train(4)
    torch.manual_seed(99)
    resumed = Run(tmp_path, seed=5)
    assert resumed.resume() == resumed.step == 3
    resumed.train(4)
    assert resumed.everything() == straight.everything()


def test_a_checkpoint_holds_all_but_the_declared_frozen_parts(tmp_path: Path) -> None:
    """LAVIS drops every parameter without gradient, momentum towers included, and then loads strictly."""
    run = Run(tmp_path)
    folder = run.save()
    assert sorted(p.name for p in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.pt",
        "rank-00000.pt",
        "state.json",
    ]
    assert set(read_weights(folder)) == {n for n in run.model.state_dict() if not n.startswith("tower.")}
    state = json.loads((folder / "state.json").read_text())
    assert state["frozen"] == {"tower.": {"source": "tower.pth", "sha256": fingerprint(run.model, "tower.")}}
    assert set(state["stateful"]) == {"schedule", "progress"}
    assert set(state["files"]) == {"model.safetensors", "optimizer.pt", "rank-00000.pt"}


def test_every_file_is_readable_without_running_code(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train()
    folder = run.save()
    for file in folder.glob("*.pt"):
        assert isinstance(torch.load(file, weights_only=True), dict)


def test_state_that_would_need_pickle_is_our_own_mistake(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.per_rank["loader"] = Position(offset=np.int64(3))
    with pytest.raises(TypeError, match=r"per_rank\.loader\.offset is a int64"):
        run.save()
    run = Run(tmp_path)
    run.stateful["more"] = Position(pair={1: {2, 3}})
    with pytest.raises(TypeError, match=r"stateful\.more\.pair\.1 is a set"):
        run.save()
    assert latest(tmp_path) is None


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> list[Any]:
        return [random.gauss(0, 1), np.random.randn(), torch.randn(2).tolist(), np.random.randint(100)]

    draw()  # leaves half a pair of Gaussian numbers behind
    state = capture_rng()
    drawn = draw()
    draw()
    restore_rng(state)
    assert draw() == drawn


def test_weights_alone_can_be_loaded_for_evaluation(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train()
    folder = run.save()
    other = Toy(seed=5)
    report = load_model(folder, other)
    assert report.missing == ["tower.weight", "tower.bias"]
    assert fingerprint(other) == fingerprint(run.model)
    assert find_weights(tmp_path) == tmp_path / "checkpoints/last/model.safetensors"


# Whole or absent


class Killed(BaseException):
    """What a kill looks like from inside."""


def operations(monkeypatch: pytest.MonkeyPatch, kill_at: int | None) -> list[str]:
    """Records every operation on files that a save makes, and is killed before number `kill_at`."""
    done: list[str] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            if len(done) == kill_at:
                raise Killed
            done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    watch(os, "rename")
    watch(os, "replace")
    watch(os, "fsync")
    watch(Path, "mkdir")
    watch(Path, "write_text")
    watch(Path, "symlink_to")
    watch(torch, "save")
    watch(shutil, "rmtree")
    watch(checkpoint, "save_safetensors")
    watch(checkpoint_files, "checksum")
    return done


def test_a_save_that_is_killed_anywhere_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        run = Run(tmp_path / "whole", keep_last=1)
        run.train()
        run.save()
        run.train()
        done = operations(patch, None)
        run.save()
    total = len(done)
    assert total >= 20

    reached = set()
    for kill_at in range(total):
        folder = tmp_path / str(kill_at)
        torch.manual_seed(1)
        run = Run(folder, keep_last=1)
        run.train()
        run.save()
        first = run.everything()
        run.train()
        second = run.everything()
        with pytest.MonkeyPatch.context() as patch:
            operations(patch, kill_at)
            with pytest.raises(Killed):
                run.save()
        again = Run(folder, seed=5, keep_last=1)
        step = again.resume()
        assert again.everything() == {1: first, 2: second}[step]
        reached.add(step)
        for pointer in (again.checkpoints.last, again.checkpoints.best):
            assert pointer is None or checkpoint.read_state(pointer)["step"] == step
        assert not [name for name in names(folder) if name.startswith(atomic.PARTIAL)]
        again.train()
        again.save()
        assert latest(folder) == folder / "checkpoints" / f"step-{step + 1:08d}"
    assert reached == {1, 2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_dies_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """As above without Python's cleaning up: the process is gone at once."""
    run = Run(tmp_path)
    run.train()
    run.save()
    for kill_at in (1, 5, 9, 14):
        run.train()
        child = os.fork()
        if child == 0:
            operations(pytest.MonkeyPatch(), kill_at)
            try:
                run.save()
            except Killed:
                os._exit(137)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137
        assert Run(tmp_path).resume() == 1
    assert names(tmp_path) == ["last", "step-00000001"]


def test_leftovers_stay_while_only_an_evaluation_looks(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save()
    writing = tmp_path / "checkpoints" / (atomic.PARTIAL + "step-00000009")
    writing.mkdir()
    looking = Checkpoints(tmp_path)
    load_model(looking.find("auto") or writing, Toy())
    assert writing.exists()
    run.train()
    Run(tmp_path).resume()
    assert not writing.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rank-00000.pt", "state.json"])
@pytest.mark.parametrize("harm", ["removed", "truncated", "emptied"])
def test_half_a_checkpoint_is_passed_over_by_auto_and_refused_by_name(
    tmp_path: Path, file: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.train()
    run.save()
    run.train()
    path = run.save() / file
    if harm == "removed":
        path.unlink()
    else:
        with path.open("r+b") as handle:
            handle.truncate(path.stat().st_size - 1 if harm == "truncated" else 0)
    if (file, harm) == ("state.json", "truncated"):
        path.write_text(path.read_text()[:-2])  # more than the last line break
    assert file in refusal(lambda: run.resume(str(path.parent)))
    assert run.resume() == 1
    assert "step-00000002" in caplog.text


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rank-00000.pt"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, file: str) -> None:
    run = Run(tmp_path)
    run.train()
    path = run.save() / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{file} is not what was written" in refusal(run.resume)


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.train()
    run.save()
    run.train()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "cannot save step 2" in refusal(run.save)
    assert names(tmp_path) == ["last", "step-00000001"]


# Rotation and pointers


def test_rotation_keeps_the_newest_the_best_and_the_resumed(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2)
    for step in range(1, 7):
        run.train()
        run.save()
        if step == 2:
            run.checkpoints.mark_best(2)
    kept = ["best", "last", "step-00000002", "step-00000005", "step-00000006"]
    assert names(tmp_path) == kept
    again = Run(tmp_path, keep_last=1)
    again.resume()
    for _ in range(3):
        again.train()
        again.save()
    assert names(tmp_path) == ["best", "last", "step-00000002", "step-00000006", "step-00000009"]
    assert again.checkpoints.best == tmp_path / "checkpoints/step-00000002"
    assert again.checkpoints.last == tmp_path / "checkpoints/step-00000009"


def test_without_links_pointers_are_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    run = Run(tmp_path)
    run.train()
    run.save()
    run.checkpoints.mark_best(1)
    assert (tmp_path / "checkpoints/best").read_text() == "step-00000001\n"
    assert run.checkpoints.best == run.checkpoints.last == tmp_path / "checkpoints/step-00000001"
    assert run.resume(str(tmp_path / "checkpoints/last")) == 1
    assert "head.weight" in read_weights(tmp_path / "checkpoints/best")


def test_a_step_without_checkpoint_cannot_become_best(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.mark_best(5)
    assert run.checkpoints.best is None


def test_going_back_to_an_older_checkpoint_forgets_what_came_after(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=3)
    for _ in range(3):
        run.train()
        run.save()
    run.checkpoints.mark_best(3)
    again = Run(tmp_path)
    again.resume(str(tmp_path / "checkpoints/step-00000001"))
    assert names(tmp_path) == ["last", "step-00000001"]
    assert again.checkpoints.last == tmp_path / "checkpoints/step-00000001"


def test_resuming_from_another_run_leaves_that_one_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "first")
    for _ in range(2):
        run.train()
        run.save()
    before = names(tmp_path / "first")
    other = Run(tmp_path / "second")
    assert other.resume(str(tmp_path / "first/checkpoints/step-00000001")) == 1
    other.train()
    other.save()
    assert names(tmp_path / "first") == before
    assert names(tmp_path / "second") == ["last", "step-00000002"]


# Where to resume


def test_resume_takes_a_folder_a_pointer_or_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.checkpoints.find(None) is None
    assert run.checkpoints.find("auto") is None
    for _ in range(2):
        run.train()
        run.save()
    first, second = (tmp_path / f"checkpoints/step-0000000{n}" for n in (1, 2))
    run.checkpoints.mark_best(1)
    assert run.checkpoints.find("auto") == second
    assert run.checkpoints.find(str(first)) == first
    assert run.checkpoints.find(str(tmp_path)) == second
    assert run.checkpoints.find(str(tmp_path / "checkpoints")) == second
    assert run.checkpoints.find(str(tmp_path / "checkpoints/best")) == first


def test_a_path_without_checkpoint_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert "does not exist" in refusal(lambda: run.checkpoints.find(str(tmp_path / "gone")))
    (tmp_path / "w.pth").write_bytes(b"x")
    assert "model.init_from" in refusal(lambda: run.checkpoints.find(str(tmp_path / "w.pth")))


# What does not fit


def test_another_model_is_named(tmp_path: Path) -> None:
    class Other(Toy):
        class config(Settings):
            arch = "other"

    run = Run(tmp_path)
    run.save()
    run.model = Other()
    text = refusal(run.resume)
    assert "model.arch 'toy'" in text
    assert "'other' (Other)" in text


def test_other_sizes_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save()
    wide = Toy(width=6)
    wide.extra = nn.Linear(2, 2)
    run.model = wide
    text = refusal(run.resume)
    assert "(model.arch toy)" in text
    assert "head.weight is (2, 4), needed (2, 6)" in text
    assert "2 missing (extra.weight, extra.bias)" in text


def test_another_frozen_part_is_refused_for_training_and_told_for_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    folder = run.save()
    run.model.tower.weight.data[0, 0] += 1e-3
    assert "another frozen 'tower' (from tower.pth)" in refusal(run.resume)
    load_model(folder, run.model)
    assert "another frozen 'tower'" in caplog.text


def test_another_number_of_processes_is_refused_with_both_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folder = run.save()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "world_size": 4}))
    text = refusal(run.resume)
    assert "saved by 4 processes and this run has 1" in text
    assert "model.init_from" in text


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folder = run.save()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 2}))
    assert "format 2, this version of blip reads 1" in refusal(lambda: run.resume(str(folder)))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "files": 3}', "null", "{" * 9999]
)
def test_any_damage_to_state_json_is_told(tmp_path: Path, content: str) -> None:
    folder = Run(tmp_path).save()
    (folder / "state.json").write_text(content)
    assert "state.json" in refusal(lambda: checkpoint.read_state(folder))


def test_a_run_with_other_options_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ema = run.stateful.pop("ema")
    run.save()
    run.stateful["ema"] = ema
    assert "it lacks ema" in refusal(run.resume)
    run.save()
    del run.stateful["ema"]
    assert "it also has ema" in refusal(run.resume)
