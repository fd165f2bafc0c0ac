#!/bin/bash
# A fit on two nodes with eight GPUs each, which SLURM starts again after pre-emption or its time limit until it is done.
#   sbatch slurm/fit.sh --config configs/experiment.yaml
#SBATCH --job-name=lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

# --signal: all processes get TERM two minutes before the end, save, and leave with 75.
# --wait: where one process is gone without a word, the others are ended a minute later.
srun --wait=60 .venv/bin/lora-lightning fit "$@" \
  --config configs/strategy/ddp.yaml \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --ckpt_path auto
code=$?

if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
