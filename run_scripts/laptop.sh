#!/usr/bin/env bash
# BLIP-2 and InstructBLIP of real pretrained parts, on a laptop's CPU or one small GPU: a frozen ViT-S/14 (DINOv2), a
# Q-Former that begins as MiniLM, and a frozen SmolLM2-135M-Instruct. Prepares the parts, writes what the tower sees of
# the pictures once, and trains stage 1, stage 2 and instructions, each from the one before.
#
#   bash run_scripts/laptop.sh [--output FOLDER] [--data FOLDER] [key=value ...]
#   bash run_scripts/laptop.sh --captions TABLE --images FOLDER [--test TABLE] ...      one's own pictures
#
# Without --captions the embedded pictures are made, of 112 px. A table is a CSV with the columns image and caption; the
# pictures of --test are captioned and scored. Stopped or failed, the same line goes on where it was; what is finished is
# kept. key=value goes to all runs.
#
# BLIP_OUTPUT: the runs' folder (output/laptop). BLIP_DATA: where parts and pictures go (data/laptop). BLIP_OPTIONS: more
# key=value, with blanks between them. BLIP_SCENES: options of `blip data make scenes`. BLIP_PROCESSES: how many share
# the work of a step. BLIP_PYTHON: a Python that has blip[laptop] and the parts' packages; without it an environment is
# made in BLIP_VENV (.venv).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

captions='' images='' test=''
export BLIP_DATA=${BLIP_DATA:-data/laptop}
blip_arguments output/laptop "--captions --images --test" "$@"
if [ -n "$captions$images$test" ]; then
  [ -n "$captions" ] && [ -n "$images" ] || {
    echo "error: one's own pictures take --captions TABLE and --images FOLDER, and --test TABLE to score some" >&2
    exit 2
  }
  for name in captions images test; do
    [ -z "${!name}" ] || [[ ${!name} == /* ]] || printf -v "$name" '%s' "$here/${!name}"
    [ -z "${!name}" ] || [ -e "${!name}" ] || { echo "error: --$name: ${!name} is not there" >&2 && exit 2; }
  done
fi

blip_laptop_ready

pictures=() told=()
if [ -n "$captions" ]; then
  pictures=(datasets.scenes.images="$images")
  if [ -n "$test" ]; then
    pictures+=(datasets.scenes.path="{train: '$captions', test: '$test'}")
  else
    pictures+=(datasets.scenes.path="$captions" "run.test_splits=[]")
  fi
  told=(datasets.scenes_instruct.path="$captions" datasets.scenes_instruct.images="$images" "run.test_splits=[]")
else
  "$python" -m blip.data make scenes --size 112 ${scenes[@]+"${scenes[@]}"}
fi

blip_features laptop/pretrain_stage1.yaml "$output/features" ${pictures[@]+"${pictures[@]}"} \
  ${options[@]+"${options[@]}"}
features=$output/features/scenes
pictures+=(datasets.scenes.features="$features")
blip_stage "stage 1" laptop/pretrain_stage1.yaml "$output/stage1" "${pictures[@]}"
blip_stage "stage 2" laptop/pretrain_stage2.yaml "$output/stage2" "${pictures[@]}" model.init_from="$output/stage1"
blip_stage instructions laptop/instruct.yaml "$output/instruct" ${told[@]+"${told[@]}"} \
  datasets.scenes_instruct.features="$features" model.init_from="$output/stage2"
echo "Reports: $output/*/report.html"
