#!/usr/bin/env bash
# What stage 1 is good for (BLIP-2, figure 5), on the embedded pictures: stage 2 from stage 1, and the same stage 2 with
# a Q-Former that starts at random. Both are given the same frozen tower, a pretrained ViT-S/14 that has never seen a
# caption; Q-Former and language models are those of configs/tiny. Stage 2 is short, 400 steps of 64: after 1200 (tried
# with one seed) a Q-Former that started at random has caught up on these simple pictures. With a decoder and with an
# encoder-decoder, each with three seeds, of stage 1 too: on one core a stage 1 takes 12 minutes and a stage 2 three to
# four, so all of it an hour or so on two. Prints the scores of the test pictures' captions.
#
#   bash run_scripts/stage1_ablation.sh [--output FOLDER] [--data FOLDER] [--llm "decoder encoder-decoder"]
#                                       [--seeds "1 2 3"] [key=value ...]
#
# Stopped or failed, the same line goes on where it was; what is finished is kept. key=value goes to all runs.
#
# BLIP_OUTPUT: the runs' folder (output/stage1-ablation). BLIP_DATA: where pictures, tower and language models go
# (data/laptop). BLIP_OPTIONS: more key=value, with blanks between them. BLIP_SCENES: options of `blip data make scenes`.
# BLIP_PROCESSES: how many share the work of a step. BLIP_PYTHON: a Python that has blip[laptop] and the parts' packages;
# without it an environment is made in BLIP_VENV (.venv).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

llm='decoder encoder-decoder' seeds='1 2 3'
export BLIP_DATA=${BLIP_DATA:-data/laptop}
blip_arguments output/stage1-ablation "--llm --seeds" "$@"
declare -A recipes=([decoder]=pretrain_stage2 [encoder-decoder]=pretrain_stage2_t5)
for kind in $llm; do
  [ -n "${recipes[$kind]:-}" ] || { echo "error: --llm $kind: choose decoder, encoder-decoder or both" >&2 && exit 2; }
done

blip_laptop_ready
"$python" -m blip.data make scenes --size 112 ${scenes[@]+"${scenes[@]}"}
for kind in $llm; do "$python" run_scripts/tiny_llm.py --data "$data" --kind "$kind"; done

view='{name: blip_image_eval, image_size: 112, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}'
shown=(
  model.vit_init_from=parts/vit_s14.safetensors
  'model.vit={patch_size: 14, width: 384, depth: 12, heads: 6, mlp_dim: 1536, stem_width: 0}'
  model.image_size=112 "datasets.scenes.vis_processor={train: $view, eval: $view}"
)
blip_features "tiny/${recipes[${llm%% *}]}.yaml" "$output/features" "${shown[@]}" ${options[@]+"${options[@]}"}
shown+=(datasets.scenes.features="$output/features/scenes")
for seed in $seeds; do
  stage1=$output/stage1-$seed same=(run.seed="$seed" "${shown[@]}" run.max_iters=400)
  # The tower need not be trained first, so that all three losses are there from the beginning.
  blip_stage "stage 1, seed $seed" tiny/pretrain_stage1.yaml "$stage1" run.seed="$seed" "${shown[@]}" \
    model.vit_train_steps=0 'model.vit_train_objectives=[itc, itm, lm]'
  for kind in $llm; do
    recipe=tiny/${recipes[$kind]}.yaml
    blip_stage "$kind from stage 1, seed $seed" "$recipe" "$output/$kind-both-$seed" "${same[@]}" \
      model.init_from="$stage1"
    blip_stage "$kind without stage 1, seed $seed" "$recipe" "$output/$kind-skipped-$seed" "${same[@]}"
  done
done

for kind in $llm; do
  # shellcheck disable=SC2086
  "$python" run_scripts/ablation_table.py "$output/$kind-{arm}-{seed}" --arms both skipped --seeds $seeds \
    --scores 'CIDEr|Bleu_4|attr_acc|caption_acc'
done
