"""Stage 1 in two processes gives the losses and gradients of one (float64, 1e-10).

Run as a script, this file is one of those processes: `test_blip2_ranks.py RANK WORLD FOLDER`.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import Tensor

from blip import dist
from blip.batch import Output
from blip.config.schema import RunConfig
from blip.engine.cached import cached_step
from blip.engine.parallel import Parallel
from tests.reference.small_stage1 import assert_same, global_batch, gradients, losses, part_of, small_model

ROOT = Path(__file__).parents[3]
WORLD = 2
FIRST: dict[str, Any] = {"vit_train_steps": 2}
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], bool]] = {
    "even": ({}, (0, 6), False),
    "repeated pictures": ({}, (0, 8), True),
    "uneven": ({}, (0, 7), True),
    "one row on the last rank": ({}, (0, 3), True),
    "trained tower": ({"freeze_vit": False}, (0, 7), True),
    "columns detached": ({"gather_with_grad": False, "freeze_vit": False}, (0, 7), True),
    "ITC alone": (FIRST | {"vit_train_objectives": ["itc"]}, (0, 7), True),
    "LM alone": (FIRST | {"vit_train_objectives": ["lm"]}, (0, 7), True),
    "ITM and LM": (FIRST | {"vit_train_objectives": ["itm", "lm"]}, (0, 7), True),
    "cached": ({}, (0, 4, 8), True),
    "cached, uneven": ({}, (0, 4, 7), True),
    "cached, trained tower": ({"freeze_vit": False}, (0, 4, 7), True),
    "cached, ITC alone": (FIRST | {"vit_train_objectives": ["itc"]}, (0, 4, 7), True),
}
"""Name -> configuration, cuts between micro-batches, whether rows have picture numbers."""


def measure(values: dict[str, Any], cuts: tuple[int, ...], ids: bool) -> dict[str, dict[str, Tensor]]:
    """One step of this process on its rows: losses averaged over the ranks, averaged gradients."""
    parallel = Parallel(RunConfig(task="x", max_iters=1, device="cpu"))
    model, batch = small_model(**values), global_batch(cuts[-1], ids)
    parts = [part_of(batch, a, b, shares=dist.world_size()) for a, b in itertools.pairwise(cuts)]
    output: Output
    if len(parts) > 1:
        output = cached_step(model, parts, lambda loss: loss, nullcontext, lambda number: None)
        parallel.average_grads(model.parameters())
    else:
        trained = parallel.wrap(model)
        output = trained(parts[0])
        output.loss.backward()
    found = {k: v for k, v in losses(output).items() if k.startswith("loss")}
    return {
        "losses": {name: dist.sum_tensor(value) / dist.world_size() for name, value in found.items()},
        "gradients": gradients(model),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    """What each of two processes found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [[sys.executable, __file__, str(rank), str(WORLD), str(folder)] for rank in range(WORLD)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.multi
@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(name: str, ranks: list[dict[str, Any]]) -> None:
    values, cuts, ids = CASES[name]
    whole = (0, cuts[-1])
    expected = measure(values, whole, ids)
    for rank in ranks:
        assert_same(rank[name]["losses"], expected["losses"])
        assert_same(rank[name]["gradients"], expected["gradients"])


def main(rank: int, world: int, folder: Path) -> None:
    td.init_process_group("gloo", f"file://{folder / 'store'}", timedelta(seconds=120), world, rank)
    torch.save({name: measure(*case) for name, case in CASES.items()}, folder / f"{rank}.pt")
    td.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
