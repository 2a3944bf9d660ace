#!/usr/bin/env bash
# Train on the nodes of a Slurm job, one torchrun agent per node:
#
#   sbatch --nodes 4 scripts/slurm_train.sh RECIPE [key=value …]
#
# RECIPE, model, data and run.dir must be on a file system that all nodes see. Submitted again, the
# same line goes on from the last checkpoint.
#SBATCH --job-name=tapo_train
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@300
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: sbatch [--nodes N] $0 RECIPE [key=value …]" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
source .venv/bin/activate

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of its own per job, in case two share the node.
port=$((20000 + SLURM_JOB_ID % 20000))
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" \
  -m tapo_train train "$@"
