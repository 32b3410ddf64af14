#!/usr/bin/env bash
#SBATCH --job-name=reward_model_6b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
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
submitted=$(scontrol show job "${SLURM_JOB_ID:?submit this script with sbatch}") # $0 is Slurm's copy
submitted=${submitted#*Command=} submitted=${submitted%%$'\n   WorkDir='*}      # its path and arguments
here=$(dirname "$(readlink -f "${submitted%" $*"}")")
[[ -f $here/common.sh ]] || here=${REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm # a copy of this script, elsewhere
[[ -f $here/common.sh ]] || { echo "error: $here/common.sh: no such file; set REPOSITORY to the repository" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$here/common.sh"
