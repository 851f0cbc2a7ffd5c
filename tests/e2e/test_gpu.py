"""On a GPU: the same losses as on a CPU, half precision, and continuing bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Recipe
from tests.e2e.runs import ROOT, train_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(recipe: Path, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train in a process of its own; returns the lines of training."""
    command = [
        sys.executable,
        "-m",
        "blip.train",
        "--cfg",
        str(recipe),
        f"run.output_dir={output}",
        *overrides,
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return train_lines(output)


def losses(lines: list[dict[str, Any]]) -> torch.Tensor:
    """(steps, 3): ITC, ITM and LM."""
    return torch.tensor([[line[f"loss_{name}"] for name in ("itc", "itm", "lm")] for line in lines])


def test_a_gpu_computes_what_a_cpu_does(recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(run={"max_iters": 5, "valid_splits": [], "test_splits": []})
    cpu = train(path, tmp_path / "cpu", "run.device=cpu")
    gpu = train(path, tmp_path / "gpu", "run.device=cuda", "run.deterministic=true")
    torch.testing.assert_close(losses(gpu), losses(cpu), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(recipe: Recipe, tmp_path: Path, precision: str) -> None:
    path = recipe(run={"device": "cuda", "max_iters": 5, "valid_splits": [], "test_splits": []})
    full = train(path, tmp_path / "fp32")
    half = train(path, tmp_path / precision, f"run.precision={precision}")
    torch.testing.assert_close(losses(half)[:2], losses(full)[:2], atol=0.05, rtol=0.05)


def test_a_deterministic_run_goes_on_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    settings = {
        "device": "cuda",
        "deterministic": True,
        "max_iters": 8,
        "valid_splits": [],
        "test_splits": [],
    }
    path = recipe(run=settings, model={"dropout": 0.1})
    steady = "run.lr_sched=constant_lr"  # the same rates, however long the run is to be
    whole = train(path, tmp_path / "whole", steady)
    train(path, tmp_path / "parts", steady, "run.max_iters=4")
    assert train(path, tmp_path / "parts", steady, "run.resume=auto") == whole
    assert len(whole) == 8
