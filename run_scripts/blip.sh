#!/usr/bin/env bash
# BLIP from pre-training to scores on the embedded pictures, some 40 minutes on two CPU cores: pre-trains, starts
# retrieval and captioning from that run, question answering from captioning, sentences about two pictures from question
# answering, and prints all scores. Captioning trains the tower first; what it sees then is written once, and captioning's
# main part, questions and sentences learn from that.
#
#   bash run_scripts/blip.sh [--output FOLDER] [--data FOLDER] [key=value ...]
#
# Stopped or failed, the same line goes on where it was; what is finished is kept. key=value goes to every stage.
#
# BLIP_OUTPUT: the runs' folder (output/blip-tiny). BLIP_DATA: where the pictures go (data). BLIP_OPTIONS: more key=value,
# with blanks between them. BLIP_SCENES: options of `blip data make scenes`, such as "--train 500". BLIP_PROCESSES: how
# many share the work of a step (2 on a CPU of two cores or more, where two with a thread each are faster than one with
# two; else 1). BLIP_PYTHON: a Python that has blip; without it an environment is made in BLIP_VENV (.venv).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

blip_arguments output/blip-tiny "" "$@"
blip_ready

# stage NAME [key=value ...]
stage() {
  blip_stage "$1" "tiny/blip_$1.yaml" "$output/$1" "${@:2}"
}

"$python" -m blip.data make scenes ${scenes[@]+"${scenes[@]}"}
stage pretrain
stage tower model.init_from="$output/pretrain"
blip_features tiny/blip_caption.yaml "$output/features" model.init_from="$output/tower" ${options[@]+"${options[@]}"}
features=$output/features/scenes
stage caption model.init_from="$output/tower" datasets.scenes.features="$features"
stage retrieval model.init_from="$output/pretrain"
stage vqa model.init_from="$output/caption" datasets.scenes_vqa.features="$features"
stage nlvr model.init_from="$output/vqa" datasets.scenes_nlvr.features="$features"

"$python" - "$output" <<'PY'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
kinds = ("itc_", "question_type_", "answer_type_", "type_")  # the report has them
rows = []
for stage in ("pretrain", "caption", "retrieval", "vqa", "nlvr"):
    lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["split"] == "test"][-1]
    shown = {k: v for k, v in scores.items() if isinstance(v, float) and not k.startswith(kinds)}
    rows += [(stage, scores["step"], name, value) for name, value in shown.items()]
print(f"\n{'stage':<10} {'step':>6}  {'score':<12} {'test':>8}")
for i, (stage, step, name, value) in enumerate(rows):
    first = i == 0 or rows[i - 1][0] != stage
    print(f"{stage if first else '':<10} {step if first else '':>6}  {name:<12} {value:>8.2f}")
print(f"Reports: {folder}/*/report.html")
PY
