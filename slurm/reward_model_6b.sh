#!/usr/bin/env bash
#SBATCH --job-name=reward_model_6b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
#
# The 6B reward model from K-wise rankings, on 1 node of 8 GPUs with 80 GB.
#
#   sbatch slurm/reward_model_6b.sh run.dir=/shared/runs/reward reward.init_from=/shared/runs/sft_6b \
#       data.tokenizer=/shared/gpt2 data.comparisons=/shared/comparisons.jsonl
#
# Hydra overrides follow the script's name; sbatch's own flags come before it. Set up: docs/cluster.md, slurm/common.sh.
# The signal comes 600 s before the time limit: more than the longest step and a checkpoint should take.
STAGE=reward_model
RECIPE=${RECIPE:-instructgpt_6b}
job=$(scontrol show job "${SLURM_JOB_ID:?submit this script with sbatch}")
submitted=$(sed -n 's/^ *Command=\([^ ]*\).*/\1/p' <<<"$job") # $0 is Slurm's copy
# shellcheck source=slurm/common.sh
source "$(dirname "$submitted")/common.sh"
