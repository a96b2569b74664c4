#!/bin/bash
# A training run on this machine, without `accrete submit`: one process for each GPU, by torchrun.
#   PROCESSES=2 launch/torchrun.sh parallel=zero2 run.dir=runs/mine
# Processes that fail are started again, from the last checkpoint, RESTARTS times; that needs run.dir.
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else restarts may meet at a stale address
exec python -m torch.distributed.run --standalone --nproc-per-node="$processes" --max-restarts="${RESTARTS:-0}" \
  -m launch.train "$@"
