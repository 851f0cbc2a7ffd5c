#!/usr/bin/env bash
# One of the papers' claims, or several, as experiments on the embedded data; `--help` tells which there are.
#
#   bash run_scripts/claims/run.sh NAME ... [--seeds 1 2 3] [--output FOLDER] [--data FOLDER] [--jobs N] [key=value ...]
#
# BLIP_PYTHON: a Python that has blip; without it an environment is made in BLIP_VENV (.venv).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

python=${BLIP_PYTHON:-}
if [ -z "$python" ]; then
  blip_env
  python=python
fi
export BLIP_PYTHON=$python
root=$PWD
cd "$here" # what --output and --data start from
exec "$python" "$root/run_scripts/claims" "$@"
