#!/bin/bash
#SBATCH --job-name=it_s___touch_broken___touch_broken____x_____HOME__
#SBATCH --nodes=2-4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=400G
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --time=12:00:00
#SBATCH --constraint=a100&ib
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --mail-type=END

cd -- /home/me || exit
module load cuda/12.4
source /shared/site.sh
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it from the job
export OMP_NUM_THREADS=12  # the cores of a process
export GLOO_SOCKET_IFNAME=ib0  # else Gloo takes the device of the host's name, which may be slow
export NCCL_SOCKET_IFNAME=ib0  # NCCL may take a bridge of containers, and hang
export NCCL_IB_HCA=mlx5_0  # else NCCL takes every adapter, those of storage, too
export NCCL_DEBUG=WARN  # NCCL says why it fails
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else torchrun's restarts over several nodes meet at stale addresses
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120  # torchrun, told to stop, ends processes after so many seconds: enough for a checkpoint
export WORDS='one $two'

run=/home/me/runs/mine
words=(
  training.global_batch_size=480
  run.dir=runs/mine
  'run.name='"'"'it\'"'"'s $(touch broken) `touch broken`; "x" & $HOME #'"'"''
)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((15000 + SLURM_JOB_ID % 15000))
exec /env/bin/python -m launch.jobs.supervise --run-dir "$run" \
  --attempts 3 --requeue -- \
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  --kill-on-bad-exit=1 \
  --container-image=/shared/accrete.sqsh \
  --container-mounts=/shared:/shared \
  python -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" \
  --nproc-per-node=8 --max-restarts=0 \
  --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \
  -m launch.train "${words[@]}"
