"""Starting the commands on a tiny recipe, in one or several processes, and reading what they leave behind."""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from blip.weights import read_weights

ROOT = Path(__file__).parents[2]
TIMES = ("samples_per_s", "data_wait", "loader_busy", "fetch_mb_per_s", "fetch_wait")
"""Figures of `metrics.jsonl` that tell how quick a run was."""

EYES = {
    "vis_processor": {
        "train": {"name": "blip_image_train", "image_size": 32},
        "eval": {"name": "blip_image_eval", "image_size": 32},
    },
    "text_processor": {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption"}},
}
HELD_OUT = {
    "path": {split: f"scenes/annotations/{split}.json" for split in ("val", "test")},
    "images": "scenes",
}
DATASETS = {
    "json": {"scenes": EYES},
    "shards": {"scenes_shards": EYES, "held_out": {**HELD_OUT, **EYES}},
}
MODEL = {
    "arch": "blip2",
    "model_type": "pretrain",
    "vit_model": "vit_base",
    "vit_init_from": None,
    "image_size": 32,
    "vit_precision": "fp32",
    "vit_train_steps": 3,
    "vit": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64},
    "num_query_token": 4,
    "cross_attention_freq": 2,
    "qformer": {
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
    "dropout": 0.0,
}
RUN = {
    "task": "image_text_pretrain",
    "device": "cpu",
    "precision": "fp32",
    "max_iters": 12,
    "batch_size_train": 16,
    "batch_size_eval": 8,
    "num_workers": 0,
    "init_lr": 1e-3,
    "min_lr": 1e-5,
    "warmup_steps": 4,
    "max_grad_norm": 1.0,
    "log_freq": 1,
    "save_freq": 2,
    "eval_freq": 4,
    "valid_splits": ["val"],
    "test_splits": ["test"],
    "k_test": 10,
    "eval_max_txt_len": 32,
}


def write_recipe(path: Path, data_root: Path, data: str, **sections: dict[str, Any]) -> Path:
    """The tiny recipe on JSON or on shard data; `sections` change single keys of `model` or `run`."""
    recipe: dict[str, Any] = copy.deepcopy(
        {"model": MODEL, "datasets": DATASETS[data], "run": {**RUN, "data_root": str(data_root)}}
    )
    for section, values in sections.items():
        recipe[section].update(values)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@dataclass
class Ended:
    """What came of a command: exit code and process id per rank, and all that it printed."""

    codes: list[int]
    pids: list[int]
    output: str

    @property
    def code(self) -> int:
        """The exit code, which is the same on all ranks."""
        assert len(set(self.codes)) == 1, f"{self.codes}\n{self.output}"
        return self.codes[0]

    def refusal(self) -> str:
        """The paragraph on stderr of rank 0, of a command that ended with exit code 2."""
        assert self.code == 2, self.output
        [line] = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.output
        return line


class Commands:
    """Starts commands by way of `tests.e2e.forks`; a context.

    Args:
        folder: for the output of the commands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def __call__(
        self,
        *argv: object,
        module: str = "blip.train",
        world: int = 1,
        traps: list[list[Any]] | None = None,
        trapped: int = 0,
        kill_after: float | None = None,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Ended:
        """Run a command to its end.

        Args:
            argv: its arguments.
            module: such as `blip.train`.
            world: number of processes.
            traps: see `tests.e2e.forks`.
            trapped: the rank that the traps are for; -1: all.
            kill_after: seconds until all ranks get SIGKILL.
            env: further environment.
            cwd: where the command runs; None: in `folder`.
        """
        self._count += 1
        log = self.folder / f"command-{self._count}.txt"
        port = free_port()
        pids = []
        for rank in range(world):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            start = {
                "module": module,
                "argv": [str(a) for a in argv],
                "env": {**(place if world > 1 else {}), **(env or {})},
                "cwd": str(cwd or self.folder),
                "log": str(log),
                "traps": (traps or []) if trapped in (rank, -1) else [],
            }
            pids.append(self._ask({"start": start}))
        timer = threading.Timer(kill_after or 0, lambda: _kill(pids))
        if kill_after is not None:
            timer.start()
        codes: dict[int, int] = {}
        while len(codes) < world:
            pid, codes[pid] = self._ask({"next": None})
            if codes[pid] == -signal.SIGKILL:  # a launcher ends the other ranks when one has died
                _kill([other for other in pids if other not in codes])
        timer.cancel()
        return Ended([codes[pid] for pid in pids], pids, log.read_text())

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def left_alive(groups: list[int]) -> list[int]:
    """Processes of these process groups that still run."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name in brackets: state, parent, process group.
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) in groups and state not in "ZX":
            alive.append(int(stat.parent.name))
    return alive


# What shows what


@functools.cache
def functions_in(path: Path) -> set[str]:
    """Names of all functions of a file of tests."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


# What a run leaves behind


def lines(folder: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the figures that tell how quick the run was."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def train_lines(folder: Path) -> list[dict[str, Any]]:
    """Those of training."""
    return [line for line in lines(folder) if line["split"] == "train"]


def contents(folder: Path) -> dict[str, Any]:
    """All that must be the same, bit by bit, however often a run was interrupted."""
    last = (folder / "checkpoints" / "last").resolve()
    state = json.loads((last / "state.json").read_text())
    found: dict[str, Any] = {"metrics": lines(folder), "last": last.name}
    found |= flat({k: v for k, v in state.items() if k != "files"}, "state.json")
    for path in sorted(last.glob("*.pt")):
        state = torch.load(path, weights_only=True)
        for name in ("python", "numpy"):  # begin anywhere in each process; nothing here draws from them
            state.get("rng", {}).pop(name, None)
        found |= flat(state, path.name)
    for name, path in (("last", last), ("model", folder / "model")):
        found |= flat(read_weights(path / "model.safetensors"), name)
    for path in sorted((folder / "predictions").iterdir()):
        found[f"predictions/{path.name}"] = path.read_text()
    return found


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested containers as one dictionary; tensors as type, shape and bytes."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | Tensor) for item in value):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}[{i}]").items()}
    if isinstance(value, Tensor):
        plain = value.detach().contiguous()
        return {name: (str(plain.dtype), tuple(plain.shape), plain.numpy().tobytes())}
    return {name: value}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same in two runs' `contents`."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
