#!/usr/bin/env bash
# From a fresh machine (Python >= 3.11 and a package registry) to retrieval scores, on two CPU cores:
# makes the environment and the embedded pictures, trains BLIP-2 stage 1 on them, prints scores and report.
#
#   bash run_scripts/quickstart.sh [key=value ...]
#
# BLIP_VENV: the environment (.venv). BLIP_DATA: where the pictures go (data).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

output=output/quickstart/$(date +%Y%m%d-%H%M%S)
for argument in "$@"; do
  case $argument in run.output_dir=*) output=${argument#*=} ;; esac
done

blip_env
python -m blip.data make scenes
python -m blip.train --cfg tiny/pretrain_stage1.yaml "$@" run.output_dir="$output"
python - "$output" <<'PY'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
scores = [line for line in lines if line["split"] != "train"][-1]
print("\nScores ({split}, step {step}):".format(**scores))
for name, value in scores.items():
    if isinstance(value, float):
        print(f"  {name:<12} {value:8.2f}")
print(f"Report: {folder / 'report.html'}")
PY
