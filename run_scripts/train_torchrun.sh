#!/usr/bin/env bash
# Trains on all GPUs of one node, or on several nodes: run the same line on each.
#
#   bash run_scripts/train_torchrun.sh --cfg pretrain_stage1.yaml [key=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash run_scripts/train_torchrun.sh --cfg ...     (NODE_RANK=1 on the other)
#
# NPROC: processes per node (default: its GPUs, 1 without any). PYTHON: the interpreter, of an environment with blip.
# torchrun hands SIGTERM and SIGINT on to the processes, which then save and stop; it kills those that take over 30 s.
set -euo pipefail

python=${PYTHON:-python}
nproc=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
if [ "${NNODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?which of the nodes, from 0}"
    --master-addr "${MASTER_ADDR:?name of node 0}" --master-port "${MASTER_PORT:-29500}")
else
  where=(--standalone)
fi
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$nproc" -m blip.train "$@"
