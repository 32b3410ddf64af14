#!/usr/bin/env bash
#SBATCH --job-name=sft_175b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
#
# Supervised fine-tuning of a 175B model on 8 nodes of 8 GPUs with 80 GB.
#
#   sbatch slurm/sft_175b.sh run.dir=/shared/runs/sft policy.init_from=/shared/gpt3_175b \
#       data.tokenizer=/shared/gpt2 data.demonstrations=/shared/demonstrations.jsonl
#
# Hydra overrides follow the script's name; sbatch's own flags come before it. Set up: docs/cluster.md, slurm/common.sh.
# The signal comes 600 s before the time limit: more than the longest step and a checkpoint should take.
STAGE=sft
RECIPE=${RECIPE:-instructgpt_175b}
job=$(scontrol show job "${SLURM_JOB_ID:?submit this script with sbatch}")
submitted=$(sed -n 's/^ *Command=\([^ ]*\).*/\1/p' <<<"$job") # $0 is Slurm's copy
# shellcheck source=slurm/common.sh
source "$(dirname "$submitted")/common.sh"
