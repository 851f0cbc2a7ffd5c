"""Instruction tuning by the tiny recipe, what its ablation changes, and the script that compares them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip.models.llm import LLMConfig, build_llm
from blip.weights import read_weights
from tests.e2e.runs import ROOT, Commands, lines, train_lines
from tests.reference.small_stage2 import LLMS

SCRIPT = str(ROOT / "run_scripts" / "instruct_ablation.sh")
HELD_IN = ("scenes", "scenes_vqa", "detail", "locate", "refer", "compare")
HELD_OUT = ("held_out_kinds", "held_out_data")
SMALL = [
    "model.image_size=32",
    "model.vit={patch_size: 8, width: 32, depth: 2, heads: 2, mlp_dim: 64, stem_width: 0}",
    "model.num_query_token=2",
    "run.warmup_steps=1",
    "run.log_freq=1",
]
QFORMER = "width: 32, depth: 2, num_heads: 2, mlp_dim: 64, max_positions: 48"


def sized(names: tuple[str, ...], stages: tuple[str, ...] = ("train", "eval")) -> list[str]:
    return [f"datasets.{name}.vis_processor.{stage}.image_size=32" for name in names for stage in stages]


@pytest.fixture(scope="module")
def stage1(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 1; beside it a small language model below the data root."""
    torch.manual_seed(1)
    llm = build_llm(None, LLMConfig(sizes=LLMS["opt"], tokenizer="scenes"))
    llm.model.save_pretrained(data_root / "llm" / "small")
    llm.tokenizer._tokenizer.save_pretrained(data_root / "llm" / "small")
    folder = tmp_path_factory.mktemp("stage1") / "run"
    more = [f"model.qformer={{{QFORMER}, init_from: null}}", "model.vit_train_steps=1", "run.max_iters=2"]
    more += ["run.batch_size_train=8", "run.test_splits=[]"]
    more += [f"run.data_root={data_root}", f"run.output_dir={folder}", *sized(("scenes",))]
    ended = commands("--cfg", "tiny/pretrain_stage1.yaml", *SMALL, *more)
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def stage2(commands: Commands, data_root: Path, stage1: Path) -> Path:
    """A run of stage 2 whose Q-Former keeps its text side."""
    folder = stage1.parent / "stage2"
    more = [f"model.qformer={{{QFORMER}}}", "model.qformer_text_input=true", "model.max_txt_len=40"]
    more += [
        f"model.init_from={stage1}",
        "model.llm_model=llm/small",
        "run.max_iters=1",
        "run.test_splits=[]",
    ]
    more += [f"run.data_root={data_root}", f"run.output_dir={folder}", *sized(("scenes",))]
    ended = commands("--cfg", "tiny/pretrain_stage2.yaml", *SMALL, *more)
    assert ended.code == 0, ended.output
    return folder


def tuned(commands: Commands, start: Path, root: Path, folder: Path, *more: str) -> Path:
    """A run of the recipe made small."""
    small = [f"model.qformer={{{QFORMER}}}", "model.llm_model=llm/small", "run.max_len=4", "run.max_iters=3"]
    small += ["run.batch_size_train=2", *sized(HELD_IN + HELD_OUT), f"model.init_from={start}"]
    place = [f"run.data_root={root}", f"run.output_dir={folder}"]
    ended = commands("--cfg", "tiny/instruct.yaml", *SMALL, *small, *place, *more)
    assert ended.code == 0, ended.output
    return folder


def test_what_is_held_in_is_trained_and_what_is_held_out_is_scored(
    commands: Commands, stage2: Path, data_root: Path, tmp_path: Path
) -> None:
    folder = tuned(commands, stage2, data_root, tmp_path / "run")
    assert len(train_lines(folder)) == 3
    scores = lines(folder)[-1]
    assert scores["split"] == "test"
    wanted = {f"held_out_kinds/type_{kind}" for kind in ("choice", "count", "verify")}
    wanted |= {f"{name}/acc" for name in HELD_OUT}
    assert wanted <= scores.keys()
    assert "held_out_data/type_vqa" in scores
    assert not any("scenes" in key for key in scores)
    assert any(name.startswith("qformer.") and "text" in name for name in read_weights(folder))


def test_the_ablation_s_other_sides_are_overrides(
    commands: Commands, stage2: Path, data_root: Path, tmp_path: Path
) -> None:
    """A Q-Former that reads nothing, other sampling, pictures' features in place of pictures."""
    stored = tmp_path / "features"
    ended = commands(
        *("--cfg", "tiny/pretrain_stage2.yaml", *SMALL, f"model.qformer={{{QFORMER}}}"),
        *(f"model.init_from={stage2}", "model.llm_model=llm/small", *sized(("scenes",))),
        *(f"run.data_root={data_root}", f"run.output_dir={stored}"),
        module="blip.cache_features",
    )
    assert ended.code == 0, ended.output
    seen = [f"datasets.{name}.features={stored}/scenes" for name in HELD_IN]
    blind = ["model.qformer_text_input=false", "run.sampling=uniform", "run.test_splits=[]"]
    runs = [
        tuned(commands, stage2, data_root, tmp_path / name, *blind, *more)
        for name, more in (("pictures", []), ("features", seen))
    ]
    assert train_lines(runs[0]) == train_lines(runs[1])
    assert not any(name.startswith("qformer.") and "text" in name for name in read_weights(runs[0]))


STAND_IN = """#!/usr/bin/env bash
if [ "$1" != -m ]; then case $1 in -) exec "$REAL_PYTHON" "$@" ;; *) exit 0 ;; esac; fi
echo "$*" >>"$CALLS"
for argument; do case $argument in run.output_dir=*) folder=${argument#*=} ;; esac; done
case "$2" in
  blip.cache_features) mkdir -p "$folder/scenes" && touch "$folder/scenes/features.json" && exit ;;
  blip.data) exit ;;
esac
if [ "${folder##*/}" = "${FAILS:-}" ]; then exit 3; fi
mkdir -p "$folder/model"
case $folder in *-1) acc=50.0 ;; *) acc=60.0 ;; esac
echo '{"split": "test", "step": 7, "held_out_data/acc": '$acc', "held_out_data/type_vqa": 1.0}' \
  >"$folder/metrics.jsonl"
touch "$folder/report.html" "$folder/model/model.safetensors"
"""


def compare(tmp_path: Path, *more: str, code: int = 0, **environment: str) -> tuple[str, list[str]]:
    """What the script prints, and the commands it has started."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    known = {"BLIP_PYTHON": str(python), "REAL_PYTHON": sys.executable, "CALLS": str(calls)}
    places = ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--seeds", "1 2"]
    done = subprocess.run(
        ["bash", SCRIPT, *places, *more],
        env=os.environ | known | {"BLIP_PROCESSES": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_the_script_compares_over_seeds_and_goes_on_where_it_was(tmp_path: Path) -> None:
    _, calls = compare(tmp_path, "run.max_iters=7", code=3, FAILS="decoder-blind-2")
    printed, again = compare(tmp_path, "run.max_iters=7")
    out = tmp_path / "out"
    assert calls[1] == (
        f"-m blip.train --cfg tiny/pretrain_stage1.yaml run.output_dir={out}/stage1 run.resume=auto"
    )
    assert calls[2] == (
        f"-m blip.train --cfg tiny/pretrain_stage2.yaml model.init_from={out}/stage1"
        f" model.qformer_text_input=true model.max_txt_len=40"
        f" run.output_dir={out}/stage2-decoder run.resume=auto"
    )
    cached = f"-m blip.cache_features --cfg tiny/pretrain_stage2.yaml model.init_from={out}/stage2-decoder"
    assert calls[3].startswith(cached)
    trained = [line for line in again if "tiny/instruct.yaml" in line]
    order = [f"{name}-{seed}" for name in ("instructed", "blind", "uniform") for seed in (1, 2)]
    begun = [*order[:4], *order[3:]]  # the one that failed, twice
    assert [line.split("run.output_dir=")[1].split()[0] for line in trained] == [
        f"{out}/decoder-{name}" for name in begun
    ]
    for line, name in zip(trained, begun, strict=True):
        assert ("model.qformer_text_input=false" in line) == name.startswith("blind")
        assert ("run.sampling=uniform" in line) == name.startswith("uniform")
        assert f"run.seed={name[-1]} " in line
        assert "run.max_iters=7" in line
        assert line.count(f"features={out}/features/scenes") == len(HELD_IN)
    [row] = [line.split() for line in printed.splitlines() if line.startswith("held_out_data")]
    assert row == ["held_out_data/acc", *["55.0", "±", "7.1"] * 3]


def test_the_script_starts_from_another_run_and_refuses_an_unknown_language_model(tmp_path: Path) -> None:
    _, calls = compare(tmp_path, "--start", str(tmp_path / "mine"), "--llm", "encoder-decoder")
    assert not any("--cfg tiny/pretrain" in line and "blip.train" in line for line in calls)
    assert calls[-1].count(f"model.init_from={tmp_path / 'mine'} ") == 1
    assert "model.llm_model=llm/scenes-encoder-decoder" in calls[-1]
    printed, _ = compare(tmp_path, "--llm", "gpt", code=2)
    assert "error: --llm gpt: choose decoder or encoder-decoder" in printed
