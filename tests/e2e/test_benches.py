"""The benchmarks at their small size, by command: they run, agree and report; no figure is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from run_scripts.bench.harness import share, times

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--size", "small", "--batch", "4")


def bench(name: str, *options: str, small: tuple[str, ...] = SMALL) -> str:
    done = subprocess.run(
        [sys.executable, f"run_scripts/bench/{name}.py", *small, *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "other", "options"),
    [
        ("stage1", "straightforward", []),
        ("blip_pretrain", "straightforward", []),
        ("stage2", "transformers", []),
        ("stage2", "transformers", ["--size", "small-t5"]),
    ],
)
def test_a_training_step_beside_another(name: str, other: str, options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    told = bench(name, "--steps", "2", "--warmup", "1", "--json", str(file), *options)
    assert "samples/s" in told
    figures = json.loads(file.read_text())
    assert figures["equal_losses"]
    assert figures["equal_gradients"]
    assert figures["flops"]["lean"] < figures["flops"]["straightforward"]
    rows = figures["rows"]
    assert [row["title"] for row in rows] == [f"{other} fp32", "blip fp32"]
    # After two steps of AdamW the weights, too, must have gone the same way.
    assert rows[0]["last_losses"] == pytest.approx(rows[1]["last_losses"], rel=1e-5)
    assert rows[0]["last_losses"] != pytest.approx(rows[0]["first_losses"], rel=1e-3)


@pytest.mark.parametrize("more", [[], ["--shared"]])
def test_capfilt_beside_the_naive_sequence(tmp_path: Path, more: list[str]) -> None:
    few = ("--pictures", "12", "--batch", "4", "--max-length", "12")
    file = tmp_path / "figures.json"
    told = bench("capfilt", "--json", str(file), *more, small=few)
    assert "pictures/s: naive" in told
    figures = json.loads(file.read_text())
    assert figures["different"] == 0
    assert figures["worst"] < 2e-5
    assert figures["texts"] == 24
    assert figures["shares_tower"] == bool(more)


def test_capfilt_in_bf16_beside_the_naive_sequence_in_fp32(tmp_path: Path) -> None:
    few = ("--pictures", "8", "--batch", "4", "--max-length", "12")
    file = tmp_path / "figures.json"
    half = ("--precision", "bf16", "--naive-precision", "fp32")
    assert "cpu bf16 (naive fp32)" in bench("capfilt", "--json", str(file), *half, small=few)
    # What is judged twice, the web's own text at least, gets nearly the same score, and not the very same.
    assert 2e-5 < json.loads(file.read_text())["worst"] < 0.05


def test_the_data_path_beside_pillow_and_with_many_annotations(tmp_path: Path) -> None:
    few = ("--size", "32", "--pictures", "32", "--rounds", "1", "--rows", "2000", "--samples", "600")
    file = tmp_path / "figures.json"
    told = bench("data", "--json", str(file), small=few)
    figures = json.loads(file.read_text())
    assert list(figures["speed"])[:5] == ["bare", "json", "shards", "json, RandAugment", "LAVIS"]
    assert all(way["per_s"] > 0 for way in figures["speed"].values())
    assert figures["speed"]["bare"]["share"] == 1.0
    found = figures["memory"]
    assert (found["rows"], len(found["worker_first_mb"])) == (2000, 2)
    assert found["samples"] >= 600
    assert "2000 records" in told


def test_memory_that_cannot_be_told_is_no_error() -> None:
    """A small model's step may find all its pages already taken."""
    assert share(0.5, 2.0) == 0.25
    assert share(0.5, 0.0) is None
    assert times(share(0.5, 0.0)) == "unknown"
    assert times(0.25) == "0.25x"


def test_generation_beside_transformers() -> None:
    told = bench("generate", "--repeats", "1", "--max-length", "12")
    assert "ids identical" in told
