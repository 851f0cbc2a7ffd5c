"""The launchers: what they start, and with which environment. Slurm and the trainer are stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip.config.load import load_config

ROOT = Path(__file__).parents[2]

STAND_INS = {
    "scontrol": """
        if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "scontrol $*"; fi
    """,
    # Two tasks, as `srun` starts them; its exit code is the highest of theirs.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        code=0
        for task in 0 1; do SLURM_PROCID=$task SLURM_NTASKS=2 "$@" || code=$?; done
        exit $code
    """,
    "trainer": """
        echo "$SLURM_PROCID/$SLURM_NTASKS $MASTER_ADDR:$MASTER_PORT $*"
        exit $TRAINER_CODE
    """,
    # Leaves what a finished run does; fails before the stage $FAILS. Anything but a module runs as it is.
    "blip-python": """
        if [ "$1" != -m ]; then exec "$REAL_PYTHON" "$@"; fi
        echo "$*" >>"$CALLS"
        case "$2" in
          blip.train | blip.evaluate | blip.cache_features | torch.distributed.run) ;;
          *) exit 0 ;;
        esac
        for argument; do case $argument in run.output_dir=*) folder=${argument#*=} ;; esac; done
        if [ "$2" = blip.cache_features ]; then
          mkdir -p "$folder/scenes" && touch "$folder/scenes/features.json" && exit
        fi
        if [ "${folder##*/}" = "${FAILS:-}" ]; then exit 3; fi
        mkdir -p "$folder/model"
        echo '{"split": "train", "step": 7, "loss": 1.0}
        {"split": "test", "step": 7, "acc": 62.5, "question_type_color": 1.0}' >"$folder/metrics.jsonl"
        touch "$folder/report.html" "$folder/model/model.safetensors"
    """,
}


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        file = folder / name
        file.write_text("#!/usr/bin/env bash\n" + text)
        file.chmod(0o755)
    return folder


def run(*command: str, code: int, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["bash", *command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def stand_in(bin_folder: Path, calls: Path, processes: int = 1) -> dict[str, str]:
    """The environment in which scripts of several runs call `blip-python`, which writes down how."""
    return {
        "BLIP_PYTHON": str(bin_folder / "blip-python"),
        "REAL_PYTHON": sys.executable,
        "CALLS": str(calls),
        "BLIP_PROCESSES": str(processes),
    }


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (3, True)])
def test_slurm_job_continues_only_after_a_stop_that_saved(
    bin_folder: Path, code: int, requeued: bool
) -> None:
    environment = {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": "trainer",
        "SLURM_JOB_ID": "40321",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "TRAINER_CODE": str(code),
    }
    script = str(ROOT / "run_scripts" / "train_slurm.sh")
    done = run(script, "--cfg", "pretrain_stage1", "run.seed=1", code=code, **environment)
    arguments = (
        "-m blip.train run.output_dir=output/slurm-40321 run.resume=auto --cfg pretrain_stage1 run.seed=1"
    )
    tasks = [f"{task}/2 node7:20321 {arguments}" for task in (0, 1)]
    assert done.stdout.splitlines() == tasks + ["scontrol requeue 40321"] * requeued


STAGES = ("pretrain", "tower", "caption", "retrieval", "vqa", "nlvr")
STARTS = {"tower": "pretrain", "caption": "tower", "retrieval": "pretrain", "vqa": "caption", "nlvr": "vqa"}
READ = {"caption": "scenes", "vqa": "scenes_vqa", "nlvr": "scenes_nlvr"}
"""Stages with a frozen tower, and their datasets."""


@pytest.mark.parametrize("processes", [1, 2])
def test_the_chain_goes_on_where_it_was_and_ends_with_all_scores(
    bin_folder: Path, tmp_path: Path, processes: int
) -> None:
    calls, output = tmp_path / "calls", tmp_path / "out"
    environment = stand_in(bin_folder, calls, processes) | {
        "BLIP_OPTIONS": "run.max_iters=7 run.seed=1",
        "BLIP_SCENES": "--train 64",
    }
    chain = [str(ROOT / "run_scripts" / "blip.sh"), "--output", str(output), "--data", str(tmp_path / "data")]
    chain.append("run.log_freq=1")
    run(*chain, code=3, FAILS="vqa", **environment)
    done = run(*chain, code=0, **environment)
    assert [line for line in done.stdout.splitlines() if line.startswith("==")] == [
        *(f"== {name}: finished before" for name in STAGES[:4]),
        "== vqa",
        "== nlvr",
    ]
    table = [line.split() for line in done.stdout.splitlines() if "acc" in line]
    assert table == [[name, "7", "acc", "62.50"] for name in STAGES if name != "tower"]
    assert "question_type" not in done.stdout
    made = ["-m blip.data make scenes --train 64"]
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 " if processes == 2 else ""
    batches = {name: load_config(f"tiny/blip_{name}.yaml").run.batch_size_train for name in STAGES}
    features = output / "features"
    seen = (
        f"-m blip.cache_features --cfg tiny/blip_caption.yaml model.init_from={output / 'tower'}"
        f" run.max_iters=7 run.seed=1 run.log_freq=1 run.output_dir={features}"
    )
    trained = [
        f"{launch}-m blip.train --cfg tiny/blip_{name}.yaml "
        + (f"run.batch_size_train={batches[name] // 2} " if processes == 2 else "")
        + (f"model.init_from={output / STARTS[name]} " if name in STARTS else "")
        + (f"datasets.{READ[name]}.features={features}/scenes " if name in READ else "")
        + f"run.max_iters=7 run.seed=1 run.log_freq=1 run.output_dir={output / name} run.resume=auto"
        for name in STAGES
    ]
    first = [*made, *trained[:2], seen, *trained[2:5]]
    assert calls.read_text().splitlines() == first + made + trained[4:]
    other = run(*chain, "run.seed=2", code=2, **environment)
    assert f"the runs in {output} have other key=value" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output"], "--output needs a value"),
        (["--outptu=x"], "--outptu=x is no option and no key=value"),
        (["run.output_dir=x"], "there are several runs; say --output FOLDER"),
    ],
)
def test_the_chain_refuses_what_it_does_not_know(arguments: list[str], message: str) -> None:
    assert message in run(str(ROOT / "run_scripts" / "blip.sh"), *arguments, code=2).stderr


def test_real_parts_on_one_s_own_pictures(bin_folder: Path, tmp_path: Path) -> None:
    calls, output, data = tmp_path / "calls", tmp_path / "out", tmp_path / "data"
    for name in ("smollm2", "minilm", "vit_s14.safetensors"):  # as if they were prepared
        (data / "parts" / name).mkdir(parents=True)
    photos, table = tmp_path / "photos", tmp_path / "captions.csv"
    photos.mkdir()
    table.touch()
    environment = stand_in(bin_folder, calls)
    laptop = str(ROOT / "run_scripts" / "laptop.sh")
    places = ["--output", str(output), "--data", str(data), "run.max_iters=7"]
    own = ["--captions", str(table), "--images", str(photos)]
    run(laptop, *places, *own, code=0, **environment)
    given = f"datasets.scenes.images={photos} datasets.scenes.path={table} run.test_splits=[]"
    stored = f"features={output}/features/scenes"
    told = (
        f"datasets.scenes_instruct.path={table} datasets.scenes_instruct.images={photos} run.test_splits=[]"
    )
    assert calls.read_text().splitlines() == [
        f"-m blip.cache_features --cfg laptop/pretrain_stage1.yaml {given} run.max_iters=7"
        f" run.output_dir={output}/features",
        f"-m blip.train --cfg laptop/pretrain_stage1.yaml {given} datasets.scenes.{stored}"
        f" run.max_iters=7 run.output_dir={output}/stage1 run.resume=auto",
        f"-m blip.train --cfg laptop/pretrain_stage2.yaml {given} datasets.scenes.{stored}"
        f" model.init_from={output}/stage1 run.max_iters=7 run.output_dir={output}/stage2 run.resume=auto",
        f"-m blip.train --cfg laptop/instruct.yaml {told} datasets.scenes_instruct.{stored}"
        f" model.init_from={output}/stage2 run.max_iters=7 run.output_dir={output}/instruct run.resume=auto",
    ]
    for wrong, message in (
        (["--images", str(photos)], "--captions TABLE and --images FOLDER"),
        ([*own, "--test", "none.csv"], "none.csv is not there"),
    ):
        assert message in run(laptop, *places, *wrong, code=2, **environment).stderr


@pytest.mark.parametrize(
    ("llm", "recipe"), [("decoder", "pretrain_stage2"), ("encoder-decoder", "pretrain_stage2_t5")]
)
def test_two_stages_end_with_captions_and_answers(
    bin_folder: Path, tmp_path: Path, llm: str, recipe: str
) -> None:
    calls, output, data = tmp_path / "calls", tmp_path / "out", tmp_path / "data"
    (data / "llm" / f"scenes-{llm}").mkdir(parents=True)
    (data / "llm" / f"scenes-{llm}" / "model.safetensors").touch()  # as if it were trained
    (data / "scenes" / "annotations").mkdir(parents=True)
    (data / "scenes" / "annotations" / "train.json").touch()
    environment = stand_in(bin_folder, calls)
    script = str(ROOT / "run_scripts" / "blip2_two_stage.sh")
    given = ["--output", str(output), "--data", str(data), "--llm", llm, "model.dropout=0.1", "run.seed=3"]
    done = run(script, *given, code=0, **environment)
    more = "model.dropout=0.1 run.seed=3 run.output_dir"
    tower = f"model.vit_init_from={output}/tower"
    untrained = "model.vit_train_steps=0 model.vit_train_objectives=[itc, itm, lm]"
    stored = f"datasets.scenes.features={output}/features/scenes"
    assert calls.read_text().splitlines() == [
        "-m blip.data make scenes",
        f"-m blip.train --cfg tiny/blip_tower.yaml run.output_dir={output}/tower run.resume=auto",
        f"-m blip.cache_features --cfg tiny/pretrain_stage1.yaml {tower} {untrained}"
        f" {more}={output}/features",
        f"-m blip.train --cfg tiny/pretrain_stage1.yaml {tower} {stored} {untrained} run.max_iters=500"
        f" run.warmup_steps=100 run.warmup_lr=0 {more}={output}/stage1 run.resume=auto",
        f"-m blip.train --cfg tiny/{recipe}.yaml {tower} {stored} model.init_from={output}/stage1"
        f" {more}={output}/stage2-{llm} run.resume=auto",
        f"-m blip.evaluate --cfg tiny/vqa_zeroshot_eval.yaml model.dropout=0.1 {tower}"
        f" model.init_from={output}/stage2-{llm} model.llm_model=llm/scenes-{llm}"
        f" run.output_dir={output}/vqa-{llm} run.overwrite=true",
    ]
    assert [line.split() for line in done.stdout.splitlines() if "acc" in line] == [["acc", "62.50"]] * 2


def test_environment_is_not_made_in_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run("-c", f"source {ROOT}/run_scripts/env.sh; blip_env", code=2, BLIP_VENV=str(tmp_path))
    assert (
        done.stderr
        == f"error: {tmp_path} is there and is no virtual environment; set BLIP_VENV to another folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_python_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    where = {"BLIP_VENV": str(tmp_path / "venv"), "PYTHON": str(old)}
    done = run("-c", f"source {ROOT}/run_scripts/env.sh; blip_env", code=2, **where)
    assert done.stderr == f"error: no Python >= 3.11 among {old}; install one, or set PYTHON to its path\n"
    assert not (tmp_path / "venv").exists()
