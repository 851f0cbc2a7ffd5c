"""Ranks and collectives; every function also works without a process group (world size 1).

Row-wise collectives take uneven ranks: the rows of a global batch of N are split as `slices` says, so
no rank has to ask the others how many rows they hold.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

T = TypeVar("T")


def initialized() -> bool:
    """Whether a process group exists."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return td.get_rank() if initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return td.get_world_size() if initialized() else 1


def local_rank() -> int:
    """Rank within the node, which is the index of the GPU to use."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def is_main() -> bool:
    """True on rank 0, which writes files and prints."""
    return rank() == 0


def init(backend: str, timeout_s: float) -> None:
    """Join the process group that torchrun (or SLURM) describes; does nothing for a single process.

    Args:
        backend: `nccl` or `gloo`.
        timeout_s: seconds after which a collective that some rank does not join is an error.
    """
    environment = os.environ
    if "SLURM_PROCID" in environment and "RANK" not in environment and "MASTER_ADDR" in environment:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    if initialized() or int(environment.get("WORLD_SIZE", "1")) <= 1:
        return
    # DistributedDataParallel imports it; imported with a group there, it would refer to that group for good.
    import torch._dynamo  # noqa: F401

    td.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def shutdown() -> None:
    """Leave the process group, if there is one; the caller has let go of everything that uses it.

    The group's threads end with the last reference to it. They may still drop tensors of collectives that are
    over, and one that does so while Python is ending aborts the process; so they have to end before.
    """
    if initialized():
        td.destroy_process_group()
        gc.collect()


def barrier() -> None:
    """Wait for all ranks."""
    if initialized():
        td.barrier()


def slices(total: int, world: int | None = None) -> list[tuple[int, int]]:
    """Half-open row ranges of the ranks in a global batch of `total` rows; earlier ranks take the surplus."""
    world = world_size() if world is None else world
    base, surplus = divmod(total, world)
    bounds = [r * base + min(r, surplus) for r in range(world + 1)]
    return list(itertools.pairwise(bounds))


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank (pickled between our own processes)."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    td.all_gather_object(box, value)
    return box


def gather_lists(own: Iterable[T]) -> list[T]:
    """The items of every rank's `own`, in rank order, on every rank."""
    return [item for part in gather_objects(list(own)) for item in part]


def sum_tensor(value: Tensor) -> Tensor:
    """Sum over the ranks, as a new tensor without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        td.all_reduce(total)
    return total


def max_tensor(value: Tensor) -> Tensor:
    """Element-wise maximum over the ranks, as a new tensor without gradient."""
    largest = value.detach().clone()
    if world_size() > 1:
        td.all_reduce(largest, op=td.ReduceOp.MAX)
    return largest


def all_true(flag: Tensor) -> bool:
    """Whether `flag` (a bool scalar tensor) holds on every rank."""
    if world_size() == 1:
        return bool(flag)
    count = flag.to(torch.int32)
    td.all_reduce(count, op=td.ReduceOp.MIN)
    return bool(count)


def any_flags(flags: list[bool], device: torch.device | None = None) -> list[bool]:
    """For each flag, whether it holds on any rank."""
    if world_size() == 1:
        return flags
    counts = torch.tensor([int(flag) for flag in flags], device=device)
    td.all_reduce(counts, op=td.ReduceOp.MAX)
    return [bool(count) for count in counts.tolist()]


def max_int(value: int, device: torch.device | None = None) -> int:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    td.all_reduce(largest, op=td.ReduceOp.MAX)
    return int(largest)


def gather_rows(rows: Tensor, total: int | None = None, grad: bool = False) -> Tensor:
    """All ranks' rows, concatenated in rank order.

    Args:
        rows: (B, ...) of this rank.
        total: rows of all ranks together, split as `slices` says; None means B on every rank.
        grad: let gradients flow back to the rank that owns a row (summed over the ranks that used it).

    Returns:
        (N, ...), the same on every rank.
    """
    if world_size() == 1:
        return rows if grad else rows.detach()
    total = rows.shape[0] * world_size() if total is None else total
    if grad and torch.is_grad_enabled():
        return _GatherRows.apply(rows, total)
    return _gather(rows.detach(), total)


def fetch_rows(rows: Tensor, index: Tensor, total: int | None = None, grad: bool = False) -> Tensor:
    """The rows of the global batch that `index` names; only those travel between ranks.

    Args:
        rows: (B, ...) of this rank.
        index: int64 (M,), global row numbers that this rank wants. Where rows are split evenly, M must be the
            same on every rank; otherwise it may differ.
        total: rows of all ranks together; None means B on every rank.
        grad: let gradients flow back to the rank that owns a row.

    Returns:
        (M, ...).
    """
    if world_size() == 1:
        return (rows if grad else rows.detach()).index_select(0, index)
    total = rows.shape[0] * world_size() if total is None else total
    if grad and torch.is_grad_enabled():
        return _FetchRows.apply(rows, index, total)
    return _fetch(rows.detach(), _Route(index, total))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        ctx.total = total
        return _gather(rows, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        td.all_reduce(grad)
        start, end = slices(ctx.total)[rank()]
        return grad[start:end], None


def _gather(rows: Tensor, total: int) -> Tensor:
    spans = slices(total)
    most = max(end - start for start, end in spans)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in spans]
    td.all_gather(parts, padded)
    return torch.cat([part[: end - start] for part, (start, end) in zip(parts, spans, strict=True)])


class _Route:
    """Who asks whom for which rows: every rank learns all requests, then rows travel point to point."""

    def __init__(self, index: Tensor, total: int) -> None:
        # Requests are a few integers per row, so they are gathered whole. Only where ranks hold unequal
        # numbers of rows may they ask for unequal numbers, which costs a message more.
        spans = slices(total)
        most = max(gather_objects(index.numel())) if total % world_size() else index.numel()
        padded = index.new_full((most,), -1)
        padded[: index.numel()] = index
        parts = [torch.empty_like(padded) for _ in spans]
        td.all_gather(parts, padded)
        bounds = torch.tensor([start for start, _ in spans], device=index.device)
        owner = torch.bucketize(index, bounds, right=True) - 1
        self.order = torch.argsort(owner, stable=True)
        self.receive = torch.bincount(owner, minlength=len(spans)).tolist()
        start, end = spans[rank()]
        mine = [part[(part >= start) & (part < end)] - start for part in parts]
        self.rows = torch.cat(mine)
        self.send = [m.numel() for m in mine]


def _exchange(payload: Tensor, send: list[int], receive: list[int]) -> Tensor:
    result = payload.new_empty(sum(receive), *payload.shape[1:])
    if td.get_backend() == "gloo":
        # gloo has no uneven all-to-all on every version; point to point does the same.
        sends, gets = list(payload.contiguous().split(send)), list(result.split(receive))
        me = rank()
        gets[me].copy_(sends[me])
        work = []
        for other in range(world_size()):
            if other != me and receive[other]:
                work.append(td.irecv(gets[other], src=other))
        for other in range(world_size()):
            if other != me and send[other]:
                work.append(td.isend(sends[other], dst=other))
        for item in work:
            if item is not None:
                item.wait()
        return result
    td.all_to_all_single(result, payload.contiguous(), receive, send)
    return result


def _fetch(rows: Tensor, route: _Route) -> Tensor:
    got = _exchange(rows.index_select(0, route.rows), route.send, route.receive)
    result = torch.empty_like(got)
    result[route.order] = got
    return result


class _FetchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, total: int) -> Tensor:
        ctx.route = _Route(index, total)
        ctx.shape = rows.shape
        return _fetch(rows, ctx.route)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        route = ctx.route
        back = _exchange(grad.index_select(0, route.order), route.receive, route.send)
        result = grad.new_zeros(ctx.shape)
        result.index_add_(0, route.rows, back)
        return result, None, None
