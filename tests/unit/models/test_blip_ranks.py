"""BLIP in two processes over several steps (float64).

With candidates and negatives of all ranks, two processes compute what one does with the whole batch (1e-10).
As in LAVIS, where each rank contrasts with its own rows and the queue and draws negatives among its own rows,
two processes compute what plain loops over both ranks do (1e-8).

Run as a script, this file is one of those processes: `test_blip_ranks.py RANK WORLD FOLDER`.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import Tensor

from blip import dist
from blip.config.schema import RunConfig
from blip.engine.parallel import Parallel
from blip.losses import argmax_sampler
from tests.reference.blip import PlainBlip
from tests.reference.small_blip import small_blip, steps_of
from tests.reference.small_stage1 import assert_same, gradients, losses, part_of

ROOT = Path(__file__).parents[3]
WORLD = 2
STEPS = 3
ALL: dict[str, Any] = {"itc_all_rank": True, "negative_all_rank": True}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    kind: str
    rows: list[int]
    """Of the steps' global batches."""
    values: dict[str, Any] = field(default_factory=dict)
    cut: int = 0
    """Where a step is cut into two micro-batches; 0: nowhere."""


EVEN, UNEVEN = [6, 8], [7, 3, 8, 5]
TOGETHER = {
    "pre-training": Case("pretrain", EVEN, ALL),
    "pre-training, uneven": Case("pretrain", UNEVEN, ALL),
    "pre-training by picture numbers": Case("pretrain", UNEVEN, {**ALL, "image_id_targets": True}),
    "pre-training, nothing shared, no queue": Case(
        "pretrain", UNEVEN, {**ALL, "share": "none", "queue_size": 0}
    ),
    "pre-training, micro-batches": Case("pretrain", [8, 7], ALL, cut=4),
    "retrieval": Case("retrieval", EVEN, ALL),
    "retrieval, uneven": Case("retrieval", UNEVEN, ALL),
    "retrieval, small queue": Case("retrieval", UNEVEN, {**ALL, "queue_size": 3}),
}
"""All ranks contrast and draw together."""
APART = {
    "pre-training": Case("pretrain", EVEN),
    "pre-training, uneven": Case("pretrain", UNEVEN),
    "pre-training, one row on the last rank": Case("pretrain", [3, 8]),
    "retrieval": Case("retrieval", EVEN),
    "retrieval, uneven": Case("retrieval", UNEVEN),
    "retrieval, one row on the last rank": Case("retrieval", [3, 8]),
    "retrieval, negatives of all ranks": Case("retrieval", UNEVEN, {"negative_all_rank": True}),
    "pre-training by picture numbers": Case("pretrain", UNEVEN, {"image_id_targets": True}),
    "all together": Case("pretrain", UNEVEN, ALL),
}
"""Each rank contrasts with its own rows and the queue."""
CASES = {f"together: {k}": v for k, v in TOGETHER.items()} | {f"apart: {k}": v for k, v in APART.items()}


def measure(case: Case, deterministic: bool) -> dict[str, Any]:
    """Some steps of this process on its rows: losses averaged over the ranks, and what they lead to."""
    parallel = Parallel(RunConfig(task="x", max_iters=1, device="cpu"))
    model = small_blip(case.kind, **case.values)
    model.twin.copy_from(model)
    if deterministic:
        model.negative_sampler = argmax_sampler
    trained = parallel.wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found: dict[str, Any] = {"losses": []}
    for batch in steps_of(STEPS, case.rows):
        total = len(batch["image"])
        cuts = [(0, case.cut), (case.cut, total)] if case.cut else [(0, total)]
        parts = [part_of(batch, *cut, shares=dist.world_size() * len(cuts)) for cut in cuts]
        outputs = []
        for i, part in enumerate(parts):
            with parallel.sync_grads(trained, last=i == len(parts) - 1):
                outputs.append(trained(part))
                (outputs[-1].loss / len(parts)).backward()
        names = [name for name in outputs[0] if name.startswith("loss")]
        sums = {name: torch.stack([losses(output)[name] for output in outputs]).mean() for name in names}
        found["losses"].append({k: dist.sum_tensor(v) / dist.world_size() for k, v in sums.items()})
        found["gradients"] = gradients(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step(outputs)
    found["state"] = {name: value.clone() for name, value in model.state_dict().items()}
    return found


def simulate(case: Case) -> tuple[list[dict[str, Tensor]], PlainBlip]:
    """Losses of both ranks, one after the other in plain loops, and the reference behind the last step."""
    model = small_blip(case.kind, **case.values)
    model.twin.copy_from(model)
    plain = PlainBlip(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for batch in steps_of(STEPS, case.rows):
        ranks = []
        for start, end in dist.slices(len(batch["image"]), WORLD):
            keys = ("image", "text_ids", "text_mask", "image_id")
            ranks.append({key: batch[key][start:end] for key in keys})
        step = plain.step(ranks, 0.4 * min(1.0, batch["step"] / 8))
        found.append({name: value.detach() for name, value in step.items()})
        optimizer.zero_grad()
        step["loss"].backward()
        optimizer.step()
    plain.move_twin()
    return found, plain


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
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


def same_losses(got: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], near: float) -> None:
    assert len(got) == len(wanted) == STEPS
    for one, other in zip(got, wanted, strict=True):
        assert_same(one, other, near)


@pytest.mark.multi
@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_weights_twin_and_queue(name: str, ranks: list[dict[str, Any]]) -> None:
    one, other = (rank[name]["state"] for rank in ranks)
    assert {"twin", "queue"} <= {key.split(".")[0] for key in one}
    assert_same(one, other, 0.0)


@pytest.mark.multi
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_that_share_candidates_compute_what_one_does(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    case = TOGETHER[name]
    expected = measure(case, deterministic=False)
    for rank in ranks:
        got = rank[f"together: {name}"]
        same_losses(got["losses"], expected["losses"], 1e-10)
        assert_same(got["gradients"], expected["gradients"], 1e-8)
        # Biases of keys have no gradient but rounding, of which AdamW makes steps.
        kept = {k: v for k, v in expected["state"].items() if not k.endswith(("key.bias", "qkv.bias"))}
        assert_same({k: v for k, v in got["state"].items() if k in kept}, kept, 1e-8)


@pytest.mark.multi
@pytest.mark.parametrize("name", APART)
def test_two_processes_compute_what_plain_loops_over_both_ranks_do(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    expected, plain = simulate(APART[name])
    for rank in ranks:
        got = rank[f"apart: {name}"]
        same_losses(got["losses"], expected, 1e-8)
        queue = {key: torch.stack([entry[key] for entry in plain.queue]) for key in ("image", "text")}
        assert_same({key: got["state"][f"queue.{key}"] for key in queue}, queue, 1e-8)
        assert got["state"]["queue.ids"].tolist() == [entry["id"] for entry in plain.queue]
        assert int(got["state"]["queue.pointer"]) == plain.pointer


@pytest.mark.multi
def test_where_negatives_come_from_matters(ranks: list[dict[str, Any]]) -> None:
    """Else agreement would say nothing: each switch gives other losses."""
    found = [
        [float(step["loss"]) for step in ranks[0][name]["losses"]]
        for name in (
            "apart: retrieval, uneven",
            "apart: retrieval, negatives of all ranks",
            "together: retrieval, uneven",
        )
    ]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(found[one][0] - found[other][0]) > 1e-3


def main(rank: int, world: int, folder: Path) -> None:
    td.init_process_group("gloo", f"file://{folder / 'store'}", timedelta(seconds=120), world, rank)
    found = {name: measure(case, deterministic=name.startswith("apart")) for name, case in CASES.items()}
    torch.save(found, folder / f"{rank}.pt")
    td.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
