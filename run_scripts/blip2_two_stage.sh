#!/usr/bin/env bash
# BLIP-2's two stages on the embedded pictures, on two CPU cores: a tower that has learned to see and a language model that
# has only read text, both frozen from then on; stage 1, stage 2, captions of the test pictures, and answers to questions
# that nobody has trained it for.
#
#   bash run_scripts/blip2_two_stage.sh [--output FOLDER] [--data FOLDER] [--llm decoder|encoder-decoder] [key=value ...]
#
# Stopped or failed, the same line goes on where it was; what is finished is kept. key=value goes to both stages,
# model.*=... to the answers as well.
#
# BLIP_OUTPUT: the runs' folder (output/blip2-tiny). BLIP_DATA: where pictures and language models go (data).
# BLIP_OPTIONS: more key=value, with blanks between them. BLIP_SCENES: options of `blip data make scenes`.
# BLIP_PYTHON: a Python that has blip; without it an environment is made in BLIP_VENV (.venv).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

llm=decoder
blip_arguments output/blip2-tiny --llm "$@"
case $llm in
  decoder) recipe=pretrain_stage2 ;;
  encoder-decoder) recipe=pretrain_stage2_t5 ;;
  *) echo "error: --llm $llm: choose decoder or encoder-decoder" >&2 && exit 2 ;;
esac

blip_ready
"$python" -m blip.data make scenes ${scenes[@]+"${scenes[@]}"}
blip_tiny_parts "$output/tower" --kind "$llm"
blip_tiny_stage1 "$output"
blip_stage "$recipe" "tiny/$recipe.yaml" "$output/stage2-$llm" "${shown[@]}" model.init_from="$output/stage1"
answers=$output/vqa-$llm
if [ ! -f "$answers/report.html" ]; then
  echo "== vqa_zeroshot_eval"
  mapfile -t built < <(blip_model_options)
  "$python" -m blip.evaluate --cfg tiny/vqa_zeroshot_eval.yaml ${built[@]+"${built[@]}"} \
    model.vit_init_from="$output/tower" model.init_from="$output/stage2-$llm" model.llm_model="llm/scenes-$llm" \
    run.output_dir="$answers" run.overwrite=true
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
