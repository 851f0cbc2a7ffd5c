#!/usr/bin/env bash
# Makes the environment and runs the tests.
#
#   bash run_scripts/test.sh                 everything but `slow`
#   bash run_scripts/test.sh -m slow         what takes minutes
#   bash run_scripts/test.sh -k retrieval    any of pytest's arguments
#
# Processes share the tests, one for each core and four at most; `-n 0` is one process, for a debugger.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

blip_env dev,eval,fairscale,llm
cores=$(nproc)
# The tests of a file stay together, since they share runs; those of the command line, which take longest, come first.
exec python -m pytest -n $((cores < 4 ? cores : 4)) --dist loadfile --no-loadscope-reorder "$@"
