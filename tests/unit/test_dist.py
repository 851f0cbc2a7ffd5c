"""Collectives of 2 and 3 gloo processes give what one process computes on the whole batch, with gradients.

Run as a script, this file is one of those processes: `test_dist.py RANK WORLD FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import Tensor

from blip import dist

ROOT = Path(__file__).parents[2]
TOTALS = {2: (1, 6, 7), 3: (2, 9, 10)}
"""World size -> rows of the global batch: fewer than ranks, evenly split, unevenly split."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)


def everything(total: int) -> Tensor:
    """float64 (N, 2, 3): the global batch."""
    return torch.randn(total, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(total))


def wanted(total: int, world: int, rank: int) -> Tensor:
    """Rows that a rank asks for, own and others', some twice; two for each of its own."""
    start, end = dist.slices(total, world)[rank]
    count = end - start
    return torch.randint(total, (2 * count,), generator=torch.Generator().manual_seed(100 * total + rank))


def gather_loss(own: Tensor, whole: Tensor) -> Tensor:
    """Every own row meets every row, as in a contrastive loss."""
    return torch.tanh(own.flatten(1) @ whole.flatten(1).T).square().sum()


def fetch_loss(fetched: Tensor, rank: int) -> Tensor:
    """Rows weigh differently in each place and rank."""
    weights = torch.arange(1.0, fetched.numel() + 1, dtype=fetched.dtype).view_as(fetched)
    return (fetched.pow(3) * weights * (rank + 1)).sum()


# One process of several


def measure(rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {
        "place": (dist.rank(), dist.world_size(), dist.is_main()),
        "objects": dist.gather_objects({"rank": rank}),
        "lists": dist.gather_lists(range(rank + 1)),
        "broadcast": dist.broadcast_object(f"from {rank}"),
        "sum": dist.sum_tensor(torch.tensor([1.0, rank])),
        "max": dist.max_tensor(torch.tensor([5, rank])),
        "max_int": dist.max_int(rank),
        "all_true": [dist.all_true(torch.tensor(flag)) for flag in (True, rank != 1, False)],
        "any": dist.any_flags([False, rank == 1, True]),
        "even": dist.gather_rows(torch.full((2,), rank)),
    }
    for total in TOTALS[world]:
        start, end = dist.slices(total)[rank]
        index = wanted(total, world, rank)
        for dtype in DTYPES:
            own = (everything(total)[start:end] * 50).to(dtype)
            found["gather", total, dtype] = dist.gather_rows(own, total)
            found["fetch", total, dtype] = dist.fetch_rows(own, index, total)
        own = everything(total)[start:end].requires_grad_()
        whole = dist.gather_rows(own, total, grad=True)
        gather_loss(own, whole).backward()
        found["gather grad", total], own.grad = own.grad, None
        fetch_loss(dist.fetch_rows(own, index, total, grad=True), rank).backward()
        found["fetch grad", total] = own.grad
        found["no grad"] = [
            dist.gather_rows(own, total).requires_grad,
            dist.fetch_rows(own, index, total).requires_grad,
        ]
        with torch.no_grad():
            found["no grad"].append(dist.gather_rows(own, total, grad=True).requires_grad)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    td.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.save(measure(rank, world), folder / f"{rank}.pt")
    dist.barrier()
    dist.shutdown()


@pytest.fixture(scope="module", params=TOTALS)
def world(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def found(world: int, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank of a group of `world` processes measured."""
    folder = tmp_path_factory.mktemp(f"world{world}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


several = pytest.mark.multi


@several
def test_gathered_rows_are_the_global_batch_on_every_rank(found: list[dict[Any, Any]], world: int) -> None:
    for total in TOTALS[world]:
        for dtype in DTYPES:
            expected = (everything(total) * 50).to(dtype)
            for rank in range(world):
                assert torch.equal(found[rank]["gather", total, dtype], expected)


@several
def test_rows_without_a_total_are_as_many_on_every_rank(found: list[dict[Any, Any]], world: int) -> None:
    for rank in range(world):
        assert found[rank]["even"].tolist() == [r for r in range(world) for _ in range(2)]


@several
def test_fetched_rows_are_those_asked_for(found: list[dict[Any, Any]], world: int) -> None:
    for total in TOTALS[world]:
        for dtype in DTYPES:
            expected = (everything(total) * 50).to(dtype)
            for rank in range(world):
                assert torch.equal(found[rank]["fetch", total, dtype], expected[wanted(total, world, rank)])


@several
def test_gradients_through_gathered_rows_are_those_of_one_process(
    found: list[dict[Any, Any]], world: int
) -> None:
    for total in TOTALS[world]:
        rows = everything(total).requires_grad_()
        sum(gather_loss(rows[start:end], rows) for start, end in dist.slices(total, world)).backward()
        parts = torch.cat([found[rank]["gather grad", total] for rank in range(world)])
        torch.testing.assert_close(parts, rows.grad, rtol=1e-12, atol=1e-12)


@several
def test_gradients_through_fetched_rows_are_those_of_one_process(
    found: list[dict[Any, Any]], world: int
) -> None:
    for total in TOTALS[world]:
        rows = everything(total).requires_grad_()
        sum(fetch_loss(rows[wanted(total, world, rank)], rank) for rank in range(world)).backward()
        parts = torch.cat([found[rank]["fetch grad", total] for rank in range(world)])
        torch.testing.assert_close(parts, rows.grad, rtol=1e-12, atol=1e-12)


@several
def test_rows_carry_no_gradient_unless_asked(found: list[dict[Any, Any]], world: int) -> None:
    assert [rank["no grad"] for rank in found] == [[False] * 3] * world


@several
def test_small_collectives_see_every_rank(found: list[dict[Any, Any]], world: int) -> None:
    for rank, values in enumerate(found):
        assert values["place"] == (rank, world, rank == 0)
        assert values["objects"] == [{"rank": r} for r in range(world)]
        assert values["lists"] == [number for r in range(world) for number in range(r + 1)]
        assert values["broadcast"] == "from 0"
        assert values["sum"].tolist() == [world, sum(range(world))]
        assert values["max"].tolist() == [5, world - 1]
        assert values["max_int"] == world - 1
        assert values["all_true"] == [True, False, False]
        assert values["any"] == [False, True, True]


# Without a process group


def test_slices_cover_the_rows_in_order_and_differ_by_one_at_most() -> None:
    assert dist.slices(10, 4) == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert dist.slices(2, 3) == [(0, 1), (1, 2), (2, 2)]
    for total in range(40):
        for world in range(1, 9):
            spans = dist.slices(total, world)
            assert [row for start, end in spans for row in range(start, end)] == list(range(total))
            sizes = [end - start for start, end in spans]
            assert max(sizes) - min(sizes) <= 1


def test_everything_works_without_a_process_group() -> None:
    rows = everything(5).requires_grad_()
    index = torch.tensor([4, 0, 4])
    assert (dist.rank(), dist.world_size(), dist.is_main(), dist.initialized()) == (0, 1, True, False)
    assert dist.gather_objects("x") == ["x"]
    assert dist.broadcast_object("x") == "x"
    assert dist.sum_tensor(rows).equal(rows.detach())
    assert dist.max_tensor(rows).equal(rows.detach())
    assert dist.max_int(3) == 3
    assert [dist.all_true(torch.tensor(flag)) for flag in (True, False)] == [True, False]
    assert dist.any_flags([True, False]) == [True, False]
    assert dist.gather_rows(rows, 5).requires_grad is False
    dist.barrier()
    dist.shutdown()
    whole = dist.gather_rows(rows, 5, grad=True)
    (gather_loss(rows, whole) + fetch_loss(dist.fetch_rows(rows, index, 5, grad=True), 0)).backward()
    again = everything(5).requires_grad_()
    (gather_loss(again, again) + fetch_loss(again[index], 0)).backward()
    assert rows.grad is not None
    assert again.grad is not None
    assert torch.equal(rows.grad, again.grad)


def test_a_single_process_joins_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    dist.init("gloo", timeout_s=5)
    assert not dist.initialized()
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init("gloo", timeout_s=5)
    assert not dist.initialized()


ENDING = """
import os, sys, torch
from blip import dist

def threads():
    return [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]

def use():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    assert any("gloo" in name for name in threads()), threads()

dist.init("gloo", 60)
use()
dist.shutdown()
left = [name for name in threads() if "gloo" in name]
sys.exit(f"still there: {left}" if left else 0)
"""


@pytest.mark.multi
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
def test_no_thread_of_a_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_local_rank_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert dist.local_rank() == 0
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert dist.local_rank() == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.local_rank() == 1


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
