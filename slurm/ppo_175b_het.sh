#!/usr/bin/env bash
#SBATCH --job-name=ppo_175b_het
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
#SBATCH hetjob
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#
# PPO-ptx of a 175B policy and its reference on 64 nodes, with the 6B reward model and critic on a node of their own: a
# heterogeneous job, whose second part may be of another kind (sbatch ... : --partition=smaller_gpus slurm/ppo_175b_het.sh).
# Both parts are one world of ranks, and the second part's are placement.critic_ranks. Otherwise as ppo_175b.sh.
STAGE=ppo
RECIPE=${RECIPE:-instructgpt_175b}
submitted=$(scontrol show job "${SLURM_JOB_ID:?submit this script with sbatch}") # $0 is Slurm's copy
submitted=${submitted#*Command=} submitted=${submitted%%$'\n   WorkDir='*}      # its path and arguments
here=$(dirname "$(readlink -f "${submitted%" $*"}")")
[[ -f $here/common.sh ]] || here=${REPOSITORY:-$SLURM_SUBMIT_DIR}/slurm # a copy of this script, elsewhere
[[ -f $here/common.sh ]] || { echo "error: $here/common.sh: no such file; set REPOSITORY to the repository" >&2 && exit 2; }
set -- placement=disaggregated "placement.critic_ranks=${SLURM_NTASKS_HET_GROUP_1:?this job has no second part}" "$@"
# shellcheck source=slurm/common.sh
source "$here/common.sh"
