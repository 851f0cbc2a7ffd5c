#!/usr/bin/env bash
# InstructBLIP's ablation on the embedded pictures: instruction tuning on six datasets by tiny/instruct.yaml, once as it
# is, once with a Q-Former that does not read the instruction, and once with all datasets drawn equally often; each with
# three seeds. A quarter of an hour of preparation on two CPU cores, then nine runs of five minutes on one core each.
# Prints the scores of what is held in and held out.
#
#   bash run_scripts/instruct_ablation.sh [--output FOLDER] [--data FOLDER] [--llm decoder|encoder-decoder]
#                                         [--seeds "1 2 3"] [key=value ...]
#
# Stopped or failed, the same line goes on where it was; what is finished is kept. All start from one run of stage 2,
# which is trained first, after tower, language model and stage 1; key=value goes to what is compared only.
#
# BLIP_OUTPUT: the runs' folder (output/instruct-tiny). BLIP_DATA: where pictures and language models go (data).
# BLIP_OPTIONS: more key=value, with blanks between them. BLIP_SCENES: options of `blip data make scenes`. BLIP_PROCESSES:
# how many share the work of a step. BLIP_PYTHON: a Python that has blip; without it an environment is made in BLIP_VENV
# (.venv).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

llm=decoder seeds='1 2 3'
blip_arguments output/instruct-tiny "--llm --seeds" "$@"
case $llm in
  decoder) stage2=pretrain_stage2 ;;
  encoder-decoder) stage2=pretrain_stage2_t5 ;;
  *) echo "error: --llm $llm: choose decoder or encoder-decoder" >&2 && exit 2 ;;
esac
recipe=tiny/instruct.yaml

blip_ready
"$python" -m blip.data make scenes ${scenes[@]+"${scenes[@]}"}
blip_tiny_parts "$output/tower" --kind "$llm" --instruct
reader=model.llm_model=llm/scenes-$llm-instruct
start=$output/stage2-$llm-instruct
given=(${options[@]+"${options[@]}"})
options=()
blip_tiny_stage1 "$output"
# Its Q-Former keeps what stage 1 has taught it of texts.
blip_stage "$stage2" "tiny/$stage2.yaml" "$start" "${shown[@]}" model.init_from="$output/stage1" "$reader" \
  model.qformer_text_input=true model.max_txt_len=40
options=(${given[@]+"${given[@]}"})

# All show the same pictures to the same tower.
stored=(model.vit_init_from="$output/tower")
for name in scenes scenes_vqa detail locate refer compare; do
  stored+=("datasets.$name.features=$output/features/scenes")
done

# compared NAME [key=value ...]: one row of the table
compared() {
  local name=$1 seed
  shift
  for seed in $seeds; do
    blip_stage "$name, seed $seed" "$recipe" "$output/$llm-$name-$seed" model.init_from="$start" \
      "$reader" "${stored[@]}" run.seed="$seed" "$@"
  done
}

compared instructed
compared blind model.qformer_text_input=false
compared uniform run.sampling=uniform

# shellcheck disable=SC2086
"$python" run_scripts/ablation_table.py "$output/$llm-{arm}-{seed}" --arms instructed blind uniform --seeds $seeds \
  --scores '.*/acc|held_out_kinds/type_.*'
