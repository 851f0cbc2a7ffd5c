"""Stand-ins of data for the tests of tasks, and ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from blip import dist
from blip.batch import EvalContext

CONTEXT = EvalContext(torch.device("cpu"), 2, nullcontext)


class FakeData:
    """`count` samples in batches of two; a subclass says what is known of each."""

    name = "fake"
    measure = ""
    server = ""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def instance_id(self, index: int) -> str:
        return f"fake/{index}"

    def picture(self, index: int) -> str | None:
        return f"/pictures/{index}.png" if index else None

    def batches(self) -> Iterator[dict[str, Any]]:
        start, end = dist.slices(len(self))[dist.rank()]
        for at in range(start, end, 2):
            index = torch.arange(at, min(at + 2, end))
            images = index[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8)
            norm = torch.tensor([[0.0] * 3, [1 / 255] * 3]).expand(len(index), 2, 3)
            yield {"image": images, "image_norm": norm, "index": index, **self.columns(index.tolist())}

    def columns(self, indices: list[int]) -> dict[str, Any]:
        return {}


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], list[Any]]:
    """Calls a function on several ranks, which are threads; gives what each of them returns."""
    place = threading.local()

    def run(world: int, function: Callable[[], Any]) -> list[Any]:
        barrier, box, results = threading.Barrier(world, timeout=20), [None] * world, [None] * world

        def gather(value: Any) -> list[Any]:
            box[place.rank] = value
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

        def work(rank: int) -> None:
            place.rank = rank
            try:
                results[rank] = function()
            except Exception as error:
                results[rank] = error

        with monkeypatch.context() as patch:
            patch.setattr(dist, "rank", lambda: place.rank)
            patch.setattr(dist, "is_main", lambda: place.rank == 0)
            patch.setattr(dist, "world_size", lambda: world)
            patch.setattr(dist, "gather_objects", gather)
            patch.setattr(dist, "broadcast_object", lambda value: gather(value)[0])
            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return results

    return run
