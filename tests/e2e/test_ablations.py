"""Scripts of several runs, with a stand-in for the command that trains."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT

# Leaves what a finished run does; fails before the run $FAILS.
STAND_IN = """#!/usr/bin/env bash
if [ "$1" != -m ]; then
  case $1 in *_table.py) exec "$REAL_PYTHON" "$@" ;; esac
  [ -n "${READS:-}" ] || exit 0
  trap 'touch "$READS/stopped"; exit' TERM
  touch "$READS/begun"
  while :; do sleep 0.05; done >/dev/null 2>&1
fi
echo "$*" >>"$CALLS"
for argument; do case $argument in run.output_dir=*) folder=${argument#*=} ;; esac; done
case "$2" in
  blip.cache_features) mkdir -p "$folder/scenes" && touch "$folder/scenes/features.json" && exit ;;
  blip.data) exit ;;
esac
if [ "${folder##*/}" = "${FAILS:-}" ]; then
  while [ -n "${READS:-}" ] && [ ! -f "$READS/begun" ]; do sleep 0.05; done
  exit 3
fi
mkdir -p "$folder/model"
case $folder in *-1) acc=50.0 ;; *) acc=60.0 ;; esac
echo '{"split": "test", "held_out_data/acc": '$acc', "held_out_data/type_vqa": 1.0, "CIDEr": 1.25}' \
  >"$folder/metrics.jsonl"
touch "$folder/report.html" "$folder/model/model.safetensors"
"""


def compare(
    tmp_path: Path, *more: str, script: str = "stage1_ablation", code: int = 0, **environment: str
) -> tuple[str, list[str]]:
    """What a script prints, and the commands it has started."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    known = {"BLIP_PYTHON": str(python), "REAL_PYTHON": sys.executable, "CALLS": str(calls)}
    places = ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    places += ["--seeds", "1 2"] if script == "stage1_ablation" else []
    done = subprocess.run(
        ["bash", str(ROOT / "run_scripts" / f"{script}.sh"), *places, *more],
        env=os.environ | known | {"BLIP_PROCESSES": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_a_tower_that_fails_stops_the_language_model_beside_it(tmp_path: Path) -> None:
    _, calls = compare(tmp_path, script="blip2_two_stage", code=3, FAILS="tower", READS=str(tmp_path))
    assert len(calls) == 2
    for _ in range(200):
        if (tmp_path / "stopped").exists():
            return
        time.sleep(0.05)
    pytest.fail("the language model goes on")


def test_stage_2_is_compared_with_and_without_stage_1_over_seeds(tmp_path: Path) -> None:
    printed, calls = compare(tmp_path, "run.max_iters=7")
    out = tmp_path / "out"
    trained = [line.removeprefix("-m blip.train --cfg tiny/") for line in calls if "blip.train" in line]
    view = "{name: blip_image_eval, image_size: 112, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
    shown = (
        "model.vit_init_from=parts/vit_s14.safetensors"
        " model.vit={patch_size: 14, width: 384, depth: 12, heads: 6, mlp_dim: 1536, stem_width: 0}"
        " model.image_size=112"
        f" datasets.scenes.vis_processor={{train: {view}, eval: {view}}}"
    )
    [cached] = [line for line in calls if "cache_features" in line]
    assert cached == (
        f"-m blip.cache_features --cfg tiny/pretrain_stage2.yaml {shown} run.max_iters=7"
        f" run.output_dir={out}/features"
    )
    shown += f" datasets.scenes.features={out}/features/scenes"
    end = "run.max_iters=7 run.output_dir={} run.resume=auto"
    expected = []
    for seed in (1, 2):
        stage1 = f"{out}/stage1-{seed}"
        alone = "model.vit_train_steps=0 model.vit_train_objectives=[itc, itm, lm]"
        expected.append(f"pretrain_stage1.yaml run.seed={seed} {shown} {alone} {end.format(stage1)}")
        for kind, recipe in (("decoder", "pretrain_stage2"), ("encoder-decoder", "pretrain_stage2_t5")):
            for arm, start in (("both", f" model.init_from={stage1}"), ("skipped", "")):
                run = f"{out}/{kind}-{arm}-{seed}"
                same = f"run.seed={seed} {shown} run.max_iters=400"
                expected.append(f"{recipe}.yaml {same}{start} {end.format(run)}")
    assert trained == expected
    rows = [line.split() for line in printed.splitlines() if line.startswith("CIDEr")]
    assert rows == [["CIDEr", *["1.25", "±", "0.00"] * 2]] * 2
    _, more = compare(tmp_path, "run.max_iters=7")
    assert [line for line in more if "blip.train" in line] == [line for line in calls if "blip.train" in line]
    refused, _ = compare(tmp_path, "--llm", "gpt", code=2)
    assert "error: --llm gpt: choose decoder, encoder-decoder or both" in refused
