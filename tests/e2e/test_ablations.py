"""The scripts that compare runs over seeds, with a stand-in for the command that trains."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT

DATASETS = ("scenes", "scenes_vqa", "detail", "locate", "refer", "compare")
"""That instruction tuning holds in."""
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
    tmp_path: Path, *more: str, script: str = "instruct", code: int = 0, **environment: str
) -> tuple[str, list[str]]:
    """What a script prints, and the commands it has started."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    known = {"BLIP_PYTHON": str(python), "REAL_PYTHON": sys.executable, "CALLS": str(calls)}
    places = ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--seeds", "1 2"]
    done = subprocess.run(
        ["bash", str(ROOT / "run_scripts" / f"{script}_ablation.sh"), *places, *more],
        env=os.environ | known | {"BLIP_PROCESSES": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_instruction_tuning_is_compared_over_seeds_and_goes_on_where_it_was(tmp_path: Path) -> None:
    _, calls = compare(tmp_path, "run.max_iters=7", code=3, FAILS="decoder-blind-2")
    printed, again = compare(tmp_path, "run.max_iters=7")
    out = tmp_path / "out"
    tower, stored = f"model.vit_init_from={out}/tower", f"datasets.scenes.features={out}/features/scenes"
    untrained = "model.vit_train_steps=0 model.vit_train_objectives=[itc, itm, lm]"
    assert calls[1:5] == [
        f"-m blip.train --cfg tiny/blip_tower.yaml run.output_dir={out}/tower run.resume=auto",
        f"-m blip.cache_features --cfg tiny/pretrain_stage1.yaml {tower} {untrained}"
        f" run.output_dir={out}/features",
        f"-m blip.train --cfg tiny/pretrain_stage1.yaml {tower} {stored} {untrained} run.max_iters=500"
        f" run.warmup_steps=100 run.warmup_lr=0 run.output_dir={out}/stage1 run.resume=auto",
        f"-m blip.train --cfg tiny/pretrain_stage2.yaml {tower} {stored} model.init_from={out}/stage1"
        " model.llm_model=llm/scenes-decoder-instruct model.qformer_text_input=true model.max_txt_len=40"
        f" run.output_dir={out}/stage2-decoder-instruct run.resume=auto",
    ]
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
        assert f"model.init_from={out}/stage2-decoder-instruct " in line
        assert f"{tower} " in line
        assert "run.max_iters=7" in line
        assert line.count(f"features={out}/features/scenes") == len(DATASETS)
    [row] = [line.split() for line in printed.splitlines() if line.startswith("held_out_data")]
    assert row == ["held_out_data/acc", *["55.0", "±", "7.1"] * 3]


def test_an_encoder_decoder_has_its_own_runs_and_an_unknown_model_is_refused(tmp_path: Path) -> None:
    _, calls = compare(tmp_path, "--llm", "encoder-decoder")
    assert any("--cfg tiny/pretrain_stage2_t5.yaml" in line for line in calls)
    assert f"model.init_from={tmp_path / 'out'}/stage2-encoder-decoder-instruct " in calls[-1]
    assert "model.llm_model=llm/scenes-encoder-decoder-instruct " in calls[-1]
    printed, _ = compare(tmp_path, "--llm", "gpt", code=2)
    assert "error: --llm gpt: choose decoder or encoder-decoder" in printed


def test_a_tower_that_fails_stops_the_language_model_beside_it(tmp_path: Path) -> None:
    _, calls = compare(tmp_path, code=3, FAILS="tower", READS=str(tmp_path))
    assert len(calls) == 2
    for _ in range(200):
        if (tmp_path / "stopped").exists():
            return
        time.sleep(0.05)
    pytest.fail("the language model goes on")


def test_stage_2_is_compared_with_and_without_stage_1_over_seeds(tmp_path: Path) -> None:
    printed, calls = compare(tmp_path, "run.max_iters=7", script="stage1")
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
    _, more = compare(tmp_path, "run.max_iters=7", script="stage1")
    assert [line for line in more if "blip.train" in line] == [line for line in calls if "blip.train" in line]
    refused, _ = compare(tmp_path, "--llm", "gpt", script="stage1", code=2)
    assert "error: --llm gpt: choose decoder, encoder-decoder or both" in refused
