"""The launchers: what they start, and with which environment. Slurm and the trainer are stand-ins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
