#!/usr/bin/env bash
#SBATCH --job-name=ppo_1_3b
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
# PPO-ptx of a 1.3B policy with a 6B reward model and critic, on 1 node of 8 GPUs with 80 GB.
#
#   sbatch slurm/ppo_1_3b.sh run.dir=/shared/runs/ppo policy.init_from=/shared/runs/sft_1_3b \
#       reward.init_from=/shared/runs/reward data.tokenizer=/shared/gpt2 data.prompts=/shared/prompts.jsonl \
#       data.pretraining.source=/shared/pretraining
#
# Hydra overrides follow the script's name; sbatch's own flags come before it. Set up: docs/cluster.md, slurm/common.sh.
# The signal comes 600 s before the time limit: more than the longest step and a checkpoint should take.
STAGE=ppo
RECIPE=${RECIPE:-instructgpt_1_3b}
submitted=$(scontrol show job "${SLURM_JOB_ID:?submit this script with sbatch}") # $0 is Slurm's copy
submitted=${submitted#*Command=} submitted=${submitted%%$'\n   WorkDir='*}      # its path and arguments
here=$(dirname "$(readlink -f "${submitted%" $*"}")")
[[ -f $here/common.sh ]] || here=${REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm # a copy of this script, elsewhere
[[ -f $here/common.sh ]] || { echo "error: $here/common.sh: no such file; set REPOSITORY to the repository" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$here/common.sh"
