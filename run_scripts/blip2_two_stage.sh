#!/usr/bin/env bash
# BLIP-2's two stages on the embedded pictures, on two CPU cores: stage 1, stage 2 with a frozen language model that has
# only read text, captions of the test pictures, and answers to questions that nobody has trained it for.
#
#   bash run_scripts/blip2_two_stage.sh [--output FOLDER] [--data FOLDER] [--llm decoder|encoder-decoder] [key=value ...]
#
# Stopped or failed, the same line goes on where it was; what is finished is kept. key=value goes to both stages.
#
# BLIP_OUTPUT: the runs' folder (output/blip2-tiny). BLIP_DATA: where pictures and language models go (data).
# BLIP_OPTIONS: more key=value, with blanks between them. BLIP_SCENES: options of `blip data make scenes`.
# BLIP_PYTHON: a Python that has blip; without it an environment is made in BLIP_VENV (.venv).
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
}

output=${BLIP_OUTPUT:-output/blip2-tiny}
data=${BLIP_DATA:-data}
llm=decoder
read -r -a options <<<"${BLIP_OPTIONS:-}"
read -r -a scenes <<<"${BLIP_SCENES:-}"
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit ;;
    --output | --data | --llm)
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2 && exit 2; }
      case $1 in --output) output=$2 ;; --data) data=$2 ;; --llm) llm=$2 ;; esac
      shift 2
      ;;
    run.output_dir=*) echo "error: there are several runs; say --output FOLDER" >&2 && exit 2 ;;
    [a-z]*=*) options+=("$1") && shift ;;
    *) echo "error: $1 is no option and no key=value; --help tells what there is" >&2 && exit 2 ;;
  esac
done
case $llm in
  decoder) recipe=pretrain_stage2 ;;
  encoder-decoder) recipe=pretrain_stage2_t5 ;;
  *) echo "error: --llm $llm: choose decoder or encoder-decoder" >&2 && exit 2 ;;
esac

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

# train RECIPE FOLDER [key=value ...]: train by configs/tiny/RECIPE, which ends with the scores of the test pictures.
train() {
  local name=$1 folder=$2
  shift 2
  if [ -f "$folder/report.html" ] && [ -f "$folder/model/model.safetensors" ]; then
    echo "== $name: finished before"
    return
  fi
  echo "== $name"
  "$python" -m blip.train --cfg "tiny/$name.yaml" "$@" ${options[@]+"${options[@]}"} \
    run.output_dir="$folder" run.resume=auto
}

"$python" -m blip.data make scenes ${scenes[@]+"${scenes[@]}"}
"$python" run_scripts/tiny_llm.py --data "$data"
train pretrain_stage1 "$output/stage1"
train "$recipe" "$output/stage2-$llm" model.init_from="$output/stage1"
answers=$output/vqa-$llm
if [ ! -f "$answers/report.html" ]; then
  echo "== vqa_zeroshot_eval"
  "$python" -m blip.evaluate --cfg tiny/vqa_zeroshot_eval.yaml model.init_from="$output/stage2-$llm" \
    model.llm_model="llm/scenes-$llm" run.output_dir="$answers" run.overwrite=true
fi

"$python" - "$output/stage2-$llm" "$answers" <<'PY'
import json, pathlib, sys

for folder in map(pathlib.Path, sys.argv[1:]):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["split"] == "test"][-1]
    print(f"\n{folder}: report.html")
    for name, value in scores.items():
        if isinstance(value, float):
            print(f"  {name:<28} {value:>8.2f}")
PY
