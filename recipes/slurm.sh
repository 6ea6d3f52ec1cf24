#!/usr/bin/env bash
#
# Post-trains on several nodes under Slurm, across as many time limits as it takes.
#
#   sbatch --time=04:00:00 recipes/slurm.sh two_nodes.yaml [--set key=value ...]
#
# Submit it after setup, download and prep, with cosmos on the PATH, in the folder in which you would
# type `cosmos train`, on a disk that the nodes share. What stands behind the script goes to that
# command. The lines below are for two nodes of eight GPUs; options of sbatch win over them.
#
#SBATCH --job-name=cosmos
#SBATCH --output=%x.%j.log
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
# One task per GPU; each task is a rank and sees all GPUs of its node.
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
# Ten minutes before the time limit, and up to one more, the ranks get SIGTERM: they finish the step,
# save, and end with 143. --time must be well above it: what was not saved is done again.
#SBATCH --signal=TERM@600
# The job may start anew, after a node has failed too, and its log goes on where it ended.
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

# This script runs on the first node, where rank 0 listens, on a port that depends on the job.
export MASTER_ADDR=$SLURMD_NODENAME MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# srun starts the ranks itself: torchrun would kill them half a minute after the signal, in the middle
# of a large save, and make every exit code 1. The first rank to end does not end the others, which
# may still be writing; when one is lost, they end by themselves within the recipe's timeout_seconds,
# and srun kills those that hang, after 2000 seconds. It ends with the highest exit code of all.
srun --kill-on-bad-exit=0 --wait=2000 --distribution=block --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec cosmos train "$@"' rank "$@"
code=$?

# Stopped by the signal: the job queues again and goes on from its save. A finished run ends here, a
# failed one too, with its exit code; after scancel the script does not come so far.
if ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
