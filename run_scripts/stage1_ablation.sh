#!/usr/bin/env bash
# What stage 1 is good for (BLIP-2, figure 5), on the embedded pictures, an hour or more on two CPU cores (not timed yet):
# stage 2 from stage 1, and the same stage 2 with a Q-Former that starts at random; the tower is that of stage 1 in both,
# the norm behind it, which learns with the Q-Former, only in the first.
# With a decoder and with an encoder-decoder, each with three seeds, of stage 1 too. Prints the scores of the test
# pictures' captions.
#
#   bash run_scripts/stage1_ablation.sh [--output FOLDER] [--data FOLDER] [--llm "decoder encoder-decoder"]
#                                       [--seeds "1 2 3"] [key=value ...]
#
# Stopped or failed, the same line goes on where it was; what is finished is kept. key=value goes to all runs.
#
# BLIP_OUTPUT: the runs' folder (output/stage1-ablation). BLIP_DATA: where pictures and language models go (data).
# BLIP_OPTIONS: more key=value, with blanks between them. BLIP_SCENES: options of `blip data make scenes`. BLIP_PROCESSES:
# how many share the work of a step. BLIP_PYTHON: a Python that has blip; without it an environment is made in BLIP_VENV
# (.venv).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

llm='decoder encoder-decoder' seeds='1 2 3'
blip_arguments output/stage1-ablation "--llm --seeds" "$@"
declare -A recipes=([decoder]=pretrain_stage2 [encoder-decoder]=pretrain_stage2_t5)
for kind in $llm; do
  [ -n "${recipes[$kind]:-}" ] || { echo "error: --llm $kind: choose decoder, encoder-decoder or both" >&2 && exit 2; }
done

blip_ready
"$python" -m blip.data make scenes ${scenes[@]+"${scenes[@]}"}
for kind in $llm; do "$python" run_scripts/tiny_llm.py --data "$data" --kind "$kind"; done
for seed in $seeds; do
  stage1=$output/stage1-$seed
  blip_stage "stage 1, seed $seed" tiny/pretrain_stage1.yaml "$stage1" run.seed="$seed"
  tower=model.vit_init_from=$stage1/model/model.safetensors
  blip_features "tiny/${recipes[${llm%% *}]}.yaml" "$output/features-$seed" "$tower" ${options[@]+"${options[@]}"}
  same=(run.seed="$seed" datasets.scenes.features="$output/features-$seed/scenes")
  for kind in $llm; do
    recipe=tiny/${recipes[$kind]}.yaml
    blip_stage "$kind from stage 1, seed $seed" "$recipe" "$output/$kind-both-$seed" "${same[@]}" \
      model.init_from="$stage1"
    blip_stage "$kind without stage 1, seed $seed" "$recipe" "$output/$kind-skipped-$seed" "${same[@]}" "$tower"
  done
done

for kind in $llm; do
  # shellcheck disable=SC2086
  "$python" run_scripts/ablation_table.py "$output/$kind-{arm}-{seed}" --arms both skipped --seeds $seeds \
    --scores 'CIDEr|Bleu_4|attr_acc|caption_acc'
done
