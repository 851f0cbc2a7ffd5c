"""A result does not depend on how many processes and workers it was computed by.

With dropout off, two processes with half the batch each take the steps of one with the whole batch, and so do
micro-batches in `cached` mode. LAVIS's samplers give every number of ranks and workers other batches, and its
micro-batches are contrasted among themselves only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blip.weights import read_weights, save_safetensors
from tests.e2e.runs import Commands, lines, train_lines, write_recipe

STEPS = 10
BATCH = {"json": 24, "shards": 16}
# 125 captions: the sixth batch has 5 rows, 3 for one rank and 2 for the other.
UNEVEN = {"drop_last": False}
RECORDS = 125
COMPARED = ("loss", "loss_itc", "loss_itm", "loss_lm", "grad_norm", "itc_acc", "itm_acc", "temp")


class Trainings:
    """Runs of the tiny recipe, each done once."""

    def __init__(self, commands: Commands, folder: Path, data_root: Path) -> None:
        self.commands, self.folder, self.data_root = commands, folder, data_root
        self.start = self._start()

    def _start(self) -> Path:
        """Weights so far from each other that every row, negative and positive counts.

        A fresh tiny model sees all pictures alike, and then its losses hardly depend on which rows there are.
        """
        fresh = self.folder / "fresh"
        recipe = write_recipe(self.folder / "fresh.yaml", self.data_root, "json", run={"test_splits": []})
        ended = self.commands("--cfg", recipe, f"run.output_dir={fresh}", "run.max_iters=1")
        assert ended.code == 0, ended.output
        random = torch.Generator().manual_seed(0)
        weights = read_weights(fresh / "model" / "model.safetensors")
        for name, tensor in weights.items():
            if tensor.ndim >= 2:
                weights[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
        save_safetensors(weights, fresh / "model" / "model.safetensors")
        return fresh

    def recipe(self, data: str, world: int, split: int) -> Path:
        """For a global batch of `BATCH[data]` rows, over `world` ranks and `split` micro-batches."""
        path = self.folder / f"{data}-{world}-{split}.yaml"
        run: dict[str, Any] = {
            "max_iters": STEPS,
            "batch_size_train": BATCH[data] // world // split,
            "accum_grad_iters": split,
            "valid_splits": [],
            "test_splits": [],
            "save_freq": None,
            **(UNEVEN if data == "json" else {}),
        }
        return write_recipe(path, self.data_root, data, model={"init_from": str(self.start)}, run=run)

    def __call__(
        self, data: str, *more: str, workers: int = 0, world: int = 1, split: int = 1, **how: Any
    ) -> Path:
        """The run folder."""
        name = "_".join([data, *more, str(workers), str(world), str(split), *how]).replace("/", "-")
        folder = self.folder / name
        if not folder.exists():
            options = [f"run.output_dir={folder}", f"run.num_workers={workers}", *more]
            if data == "json":
                options.append(f"datasets.scenes.max_samples={RECORDS}")
            recipe = self.recipe(data, world, split)
            ended = self.commands("--cfg", recipe, *options, world=world, trapped=-1, **how)
            assert ended.code == 0, ended.output
        return folder


@pytest.fixture(scope="module")
def train(commands: Commands, tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Trainings:
    return Trainings(commands, tmp_path_factory.mktemp("trainings"), data_root)


def assert_same_steps(one: Path, other: Path) -> None:
    """Losses, gradient norms and accuracies agree to 1e-5 at every step."""
    ours, theirs = train_lines(one), train_lines(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for mine, its in zip(ours, theirs, strict=True):
        assert {name: mine[name] for name in COMPARED} == pytest.approx(
            {name: its[name] for name in COMPARED}, rel=1e-5, abs=1e-5
        ), f"step {mine['step']}"


@pytest.mark.multi
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("data", ["json", "shards"])
def test_two_processes_with_half_the_batch_take_the_same_steps(
    train: Trainings, data: str, workers: int
) -> None:
    assert_same_steps(train(data, workers=workers, world=2), train(data))


def test_the_batches_of_this_file_repeat_pictures(train: Trainings) -> None:
    """Else agreement would say nothing about `image_id`: without it, the losses are others."""
    losses = [
        [line["loss_itc"] for line in train_lines(train("json", *more))]
        for more in ((), ("datasets.scenes.image_ids=false",))
    ]
    assert losses[0][:2] != pytest.approx(losses[1][:2], rel=1e-3)


def test_the_last_batch_of_an_epoch_is_a_small_one(train: Trainings) -> None:
    epochs = [line["epoch"] for line in train_lines(train("json"))]
    assert epochs == [0] * 6 + [1] * 4
    sixth = train_lines(train("json"))[5]
    assert sixth["loss_itc"] < 2  # of 5 rows; chance is log 5, and log 24 = 3.2 in the others


@pytest.mark.multi
@pytest.mark.parametrize("data", ["json", "shards"])
def test_two_processes_accumulate_the_same_micro_batches(train: Trainings, data: str) -> None:
    assert_same_steps(train(data, split=2, world=2, workers=3), train(data, split=2))


@pytest.mark.multi
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 0), (2, 3)])
def test_cached_micro_batches_take_the_steps_of_the_whole_batch(
    train: Trainings, world: int, workers: int
) -> None:
    cached = train("json", "run.accum_mode=cached", split=2, world=world, workers=workers)
    assert_same_steps(cached, train("json"))


def test_averaged_micro_batches_are_not_the_whole_batch(train: Trainings) -> None:
    """What `cached` is for; also shows that the comparison above can fail."""
    mean, whole = train_lines(train("json", split=2))[0], train_lines(train("json"))[0]
    assert abs(mean["loss_itc"] - whole["loss_itc"]) > 0.1


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("data", ["json", "shards"])
def test_any_number_of_workers_gives_the_same_bits(train: Trainings, data: str, workers: int) -> None:
    assert lines(train(data, workers=workers)) == lines(train(data))


@pytest.mark.multi
@pytest.mark.parametrize("data", ["json", "shards"])
def test_any_number_of_workers_gives_two_processes_the_same_bits(train: Trainings, data: str) -> None:
    assert lines(train(data, workers=3, world=2)) == lines(train(data, world=2))


# The gradients themselves


@pytest.mark.multi
@pytest.mark.parametrize("mode", ["plain", "cached"])
def test_gradients_of_two_processes_are_those_of_one(train: Trainings, tmp_path: Path, mode: str) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    one, two = ([["dump_gradients", str(place)]] for place in places)
    # Constant weights: what is compared at the last step is not what ten updates made of it.
    still = "run.init_lr=1e-12", "run.min_lr=0"
    train("json", *still, f"name={mode}", traps=one)
    cached = ["run.accum_mode=cached"] if mode == "cached" else []
    train("json", *still, *cached, world=2, split=2 if cached else 1, traps=two)
    for step in range(1, STEPS + 1):
        wanted = torch.load(places[0] / f"step-{step}-rank-0.pt")
        ours = [torch.load(places[1] / f"step-{step}-rank-{rank}.pt") for rank in range(2)]
        largest = max(float(grad.abs().max()) for grad in wanted)
        assert largest > 1e-2
        for number, grad in enumerate(wanted):
            assert torch.equal(ours[0][number], ours[1][number]), "ranks differ"
            error = float((ours[0][number] - grad).abs().max())
            assert error <= 1e-5 * max(1.0, largest), f"step {step}, parameter {number}"


# The real launcher


@pytest.mark.multi
def test_torchrun_gives_the_same_bits_as_any_launcher(train: Trainings, tmp_path: Path) -> None:
    recipe, folder = train.recipe("json", 2, 1), tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "blip.train"]
    options = ["--cfg", str(recipe), f"run.output_dir={folder}", f"datasets.scenes.max_samples={RECORDS}"]
    done = subprocess.run([sys.executable, *launcher, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(train("json", world=2))
    assert done.stderr.count("step 1/10") == 1  # one rank speaks


@pytest.mark.multi
def test_both_ranks_end_with_the_same_model_as_one_process(train: Trainings) -> None:
    one, two = (read_weights(train("json", world=world) / "model" / "model.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith(
            ("key.bias", "qkv.bias")
        ):  # have no gradient but rounding, of which Adam makes steps
            continue
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
