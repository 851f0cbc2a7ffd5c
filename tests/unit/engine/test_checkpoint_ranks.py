"""Facts about checkpoints of several processes.

Run as a script, this file is one of those processes: `test_checkpoint_ranks.py RANK WORLD FOLDER`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import nn

from blip import dist
from blip.engine.checkpoint import Checkpoints
from blip.errors import CheckpointError

ROOT = Path(__file__).parents[3]


class Settings:
    arch = "toy"
    model_type = "base"


class Toy(nn.Module):
    config = Settings()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def frozen_parts(self) -> dict[str, str]:
        return {}

    def state_to_save(self) -> dict[str, torch.Tensor]:
        return self.state_dict()


class Position:
    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def attempt(action: Any) -> str:
    try:
        return f"done {action()}"
    except CheckpointError as error:
        return str(error)


def work(rank: int, folder: Path) -> dict[str, Any]:
    """What one of two processes sees."""
    checkpoints = Checkpoints(folder / "run")
    model, progress, loader = Toy(), Position(step=1), Position(offset=10 + rank)
    torch.manual_seed(rank)
    place = checkpoints.save(1, model, {"progress": progress}, {"loader": loader})
    found: dict[str, Any] = {
        "drawn": torch.rand(3).tolist(),
        "files": sorted(p.name for p in place.iterdir()),
    }

    torch.manual_seed(50)
    model, progress, loader = Toy(), Position(), Position()
    latest = checkpoints.find("auto")
    assert latest is not None
    found["step"] = checkpoints.restore(latest, model, {"progress": progress}, {"loader": loader})
    found["again"] = torch.rand(3).tolist()
    found["offset"] = loader.state["offset"]

    # What only rank 0 or only rank 1 meets, all ranks hear of.
    found["unwritable"] = attempt(lambda: Checkpoints(folder / "blocked").save(1, model, {}))
    if rank == 1:
        with (place / "rank-00001.pt").open("r+b") as file:
            file.write(b"\0\0\0\0\0\0")
    dist.barrier()
    found["damaged"] = attempt(
        lambda: checkpoints.restore(place, model, {"progress": progress}, {"loader": loader})
    )
    return found


@pytest.mark.multi
def test_two_processes_save_and_resume_together_and_fail_together(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    commands = [[sys.executable, __file__, str(rank), "2", str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert found["files"] == [
            "model.safetensors",
            "optimizer.pt",
            "rank-00000.pt",
            "rank-00001.pt",
            "state.json",
        ]
        assert found["again"] == found["drawn"]
        assert (found["step"], found["offset"]) == (1, 10 + rank)
        assert "cannot save step 1" in found["unwritable"]
        assert "rank-00001.pt is not what was written" in found["damaged"]
    assert ranks[0]["drawn"] != ranks[1]["drawn"]

    alone = Checkpoints(tmp_path / "run")
    with pytest.raises(CheckpointError, match="saved by 2 processes and this run has 1"):
        alone.restore(tmp_path / "run/checkpoints/step-00000001", Toy(), {"progress": Position()})


def main(rank: int, world: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    td.init_process_group("gloo", store, timedelta(seconds=60), world, rank)
    (folder / f"{rank}.json").write_text(json.dumps(work(rank, folder)))
    td.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
