#!/usr/bin/env bash
# Trains as a Slurm job, one task per GPU, and continues by itself after a time limit or a pre-emption.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 run_scripts/train_slurm.sh --cfg NAME [key=value ...]
#
# The tasks are started without torchrun, so that Slurm's signal reaches them: they save and exit with 3, and the
# job is put into the queue again. Submit from the environment and folder that the run is to use.
#SBATCH --job-name=blip
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# The folder is the job's, so that a requeued job finds it; a key=value of the command line wins. A task that has
# saved and exits with 3 must not bring down those that are still at it.
code=0
srun --kill-on-bad-exit=0 "${PYTHON:-python}" -m blip.train \
  run.output_dir="output/slurm-$SLURM_JOB_ID" run.resume=auto "$@" || code=$?
if [ "$code" -eq 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
