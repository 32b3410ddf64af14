#!/usr/bin/env bash
#SBATCH --job-name=sft_175b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
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
submitted=$(scontrol show job "${SLURM_JOB_ID:?submit this script with sbatch}") # $0 is Slurm's copy
submitted=${submitted#*Command=} submitted=${submitted%%$'\n   WorkDir='*}      # its path and arguments
here=$(dirname "$(readlink -f "${submitted%" $*"}")")
[[ -f $here/common.sh ]] || here=${REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm # a copy of this script, elsewhere
[[ -f $here/common.sh ]] || { echo "error: $here/common.sh: no such file; set REPOSITORY to the repository" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$here/common.sh"
