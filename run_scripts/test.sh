#!/usr/bin/env bash
# Makes the environment and runs the tests.
#
#   bash run_scripts/test.sh                 everything but `slow`
#   bash run_scripts/test.sh -m slow         what takes minutes
#   bash run_scripts/test.sh -k retrieval    any of pytest's arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

blip_env dev,eval,fairscale
exec python -m pytest "$@"
