#!/usr/bin/env bash
#
# Post-train on several nodes under Slurm, requeueing the job at each time limit.
#
#   sbatch --time=04:00:00 recipes/slurm.sh two_nodes.yaml [--set key=value ...]
#
# First run setup, download and prep. Submit with cosmos on the PATH, from the folder in which you
# would type `cosmos train`, on a disk that the nodes share. The arguments after the script go to
# `cosmos train`. The lines below are for two nodes of eight GPUs; options of sbatch win over them.
#
#SBATCH --job-name=cosmos
#SBATCH --output=%x.%j.log
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
# One task per GPU: each task is a rank and sees all GPUs of its node.
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
# Ten to eleven minutes before the time limit the ranks get SIGTERM: they finish the step, save, and
# end with 143. --time must be much longer than that: a job that is killed repeats its unsaved steps.
#SBATCH --signal=TERM@600
# Slurm may requeue the job, also after a node fails. Its log is then appended to.
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

# This script runs on the first node. Rank 0 listens there, on a port that depends on the job ID.
export MASTER_ADDR=$SLURMD_NODENAME MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# srun starts the ranks, not torchrun. torchrun would kill them half a minute after the signal, in
# the middle of a large save, and turn every exit code into 1. --kill-on-bad-exit=0: the first rank
# to end does not end the others, which may still be writing. If a rank is lost, the others end
# within the recipe's timeout_seconds. --wait=2000: srun kills ranks that still hang 2000 seconds
# after the first one ended. srun returns the highest exit code of all ranks.
srun --kill-on-bad-exit=0 --wait=2000 --distribution=block --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec cosmos train "$@"' rank "$@"
code=$?

# 143 means stopped by the signal: requeue the job, which resumes from its save. A finished or
# failed run ends here with its exit code. After scancel the script does not get this far.
if ((code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
