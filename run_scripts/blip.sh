#!/usr/bin/env bash
# BLIP from pre-training to scores on the embedded pictures, some 40 minutes on two CPU cores: pre-trains, starts
# captioning and retrieval from that run, question answering from captioning, sentences about two pictures from question
# answering, and prints all scores. The last two keep captioning's tower, whose features are written once.
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

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
}

output=${BLIP_OUTPUT:-output/blip-tiny}
data=${BLIP_DATA:-data}
read -r -a options <<<"${BLIP_OPTIONS:-}"
read -r -a scenes <<<"${BLIP_SCENES:-}"
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit ;;
    --output | --data)
      [ $# -gt 1 ] || { echo "error: $1 needs a folder" >&2 && exit 2; }
      if [ "$1" = --output ]; then output=$2; else data=$2; fi
      shift 2
      ;;
    --output=*) output=${1#*=} && shift ;;
    --data=*) data=${1#*=} && shift ;;
    run.output_dir=*) echo "error: there are five runs; say --output FOLDER" >&2 && exit 2 ;;
    [a-z]*=*) options+=("$1") && shift ;;
    *) echo "error: $1 is no option and no key=value; --help tells what there is" >&2 && exit 2 ;;
  esac
done

here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# Folders are relative to where the script was called; env.sh has gone to the repository's root.
[[ $output == /* ]] || output=$here/$output
[[ $data == /* ]] || data=$here/$data
export BLIP_DATA=$data

python=${BLIP_PYTHON:-}
if [ -z "$python" ]; then
  blip_env
  python=python
fi

# Scores of a mixture of settings would not be comparable.
mkdir -p "$output"
given=$(printf '%s\n' "${options[@]:-}")
if [ ! -f "$output/options" ]; then
  printf '%s\n' "$given" >"$output/options"
elif [ "$given" != "$(cat "$output/options")" ]; then
  echo "error: the runs in $output have other key=value (see $output/options); choose another --output" >&2
  exit 2
fi

cores=$(nproc)
processes=${BLIP_PROCESSES:-}
if [ -z "$processes" ]; then
  processes=1
  [ "$cores" -lt 2 ] || command -v nvidia-smi >/dev/null || processes=2
fi
if [ "$processes" -gt 1 ]; then
  launch=(-m torch.distributed.run --standalone --nproc_per_node="$processes" -m blip.train)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + processes - 1) / processes))}
else
  launch=(-m blip.train)
fi

# stage NAME [key=value ...]: train by tiny/blip_NAME.yaml, which ends with the scores of the test pictures.
stage() {
  local name=$1 folder=$output/$1 batch share=()
  shift
  if [ -f "$folder/report.html" ] && [ -f "$folder/model/model.safetensors" ]; then
    echo "== $name: finished before"
    return
  fi
  echo "== $name"
  if [ "$processes" -gt 1 ]; then # the batch of a recipe, in parts
    batch=$(sed -n 's/^  batch_size_train: \([0-9]*\).*/\1/p' "configs/tiny/blip_$name.yaml")
    share=(run.batch_size_train=$((batch / processes)))
  fi
  "$python" "${launch[@]}" --cfg "tiny/blip_$name.yaml" ${share[@]+"${share[@]}"} "$@" \
    ${options[@]+"${options[@]}"} run.output_dir="$folder" run.resume=auto
}

"$python" -m blip.data make scenes ${scenes[@]+"${scenes[@]}"}
stage pretrain
stage caption model.init_from="$output/pretrain"
stage retrieval model.init_from="$output/pretrain"
features=$output/features/scenes_vqa
if [ ! -f "$features/features.json" ]; then
  echo "== features"
  "$python" -m blip.cache_features --cfg tiny/blip_vqa.yaml model.init_from="$output/caption" \
    ${options[@]+"${options[@]}"} run.output_dir="$output/features"
fi
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
