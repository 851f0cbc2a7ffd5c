#!/usr/bin/env bash
# All of the papers' claims that run_scripts/claims tries, over three seeds, and one page about them. Below two hours on
# two CPU cores; stopped, the same line goes on.
#
#   bash run_scripts/claims/all.sh [--seeds 1 2 3] [--output FOLDER] [--data FOLDER] [--jobs N]
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" all "$@"
