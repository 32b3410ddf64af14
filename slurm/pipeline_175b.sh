#!/usr/bin/env bash
# InstructGPT at 175B as a chain of jobs: the SFT run that PPO starts from, the 6B reward model, PPO-ptx. Run it on a
# login node. Each job starts when the previous one has succeeded; when one fails, the rest is cancelled by Slurm.
#
#   RUNS=/shared/runs TOKENIZER=/shared/gpt2 POLICY=/shared/gpt3_175b REWARD=/shared/gpt3_6b \
#   DEMONSTRATIONS=/shared/demonstrations.jsonl COMPARISONS=/shared/comparisons.jsonl \
#   PROMPTS=/shared/prompts.jsonl PRETRAINING=/shared/pretraining bash slurm/pipeline_175b.sh
#
# REWARD is what the reward model starts from; without it, the SFT run (then of the same size). Hydra overrides of one
# stage go into SFT_OVERRIDES, REWARD_OVERRIDES and PPO_OVERRIDES, sbatch's flags for all jobs into SBATCH_FLAGS, each
# written as on a command line, with quotes where a value has blanks. A job that is queued again is waited for.
# Prints the job ids.
set -euo pipefail

: "${RUNS:?a folder that all nodes share, for the three run folders}"
: "${TOKENIZER:?the tokenizer folder}"
: "${POLICY:?what the policy starts from: a checkpoint or a Hugging Face folder}"
: "${DEMONSTRATIONS:?demonstrations}" "${COMPARISONS:?rankings}"
: "${PROMPTS:?prompts}" "${PRETRAINING:?pretraining text}"

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

# The words of a text as a shell would read it: split at blanks and newlines that are not in quotes or behind a backslash.
words() { # ARRAY TEXT
    local -n into=$1
    local rest=$2 word='' quote='' character begun=0
    into=()
    while [[ -n $rest ]]; do
        character=${rest:0:1} rest=${rest:1}
        if [[ -n $quote && $character == "$quote" ]]; then
            quote=''
        elif [[ -z $quote && $character == [\'\"] ]]; then
            quote=$character begun=1
        elif [[ -z $quote && $character == [[:space:]] ]]; then
            ((begun)) && into+=("$word")
            word='' begun=0
        else
            if [[ $character == \\ && $quote != \' ]]; then
                character=${rest:0:1} rest=${rest:1}
                [[ -z $quote || $character == [\"\\] ]] || character="\\$character"
            fi
            word+=$character begun=1
        fi
    done
    ((begun == 0)) || into+=("$word")
    [[ -z $quote ]] || { echo "error: a quote ($quote) is not closed in: $2" >&2 && exit 2; }
}

flags=() sft=() reward=() ppo=()
words flags "${SBATCH_FLAGS:-}"
words sft "${SFT_OVERRIDES:-}"
words reward "${REWARD_OVERRIDES:-}"
words ppo "${PPO_OVERRIDES:-}"

submit() {
    local job
    job=$(sbatch --parsable --kill-on-invalid-dep=yes "${flags[@]}" "$@")
    echo "${job%%;*}" # without the cluster's name, which --clusters adds
}

sft_job=$(submit "$here/sft_175b.sh" "recipe=${SFT_RECIPE:-instructgpt_175b/ppo_initialization}" \
    "run.dir=$RUNS/sft" "data.tokenizer=$TOKENIZER" "policy.init_from=$POLICY" \
    "data.demonstrations=$DEMONSTRATIONS" "data.pretraining.source=$PRETRAINING" "${sft[@]}")
echo "SFT           job $sft_job"
reward_job=$(submit --dependency="afterok:$sft_job" "$here/reward_model_6b.sh" \
    "run.dir=$RUNS/reward" "data.tokenizer=$TOKENIZER" "reward.init_from=${REWARD:-$RUNS/sft}" \
    "data.comparisons=$COMPARISONS" "${reward[@]}")
echo "reward model  job $reward_job, after $sft_job"
ppo_job=$(submit --dependency="afterok:$reward_job" "$here/ppo_175b.sh" \
    "run.dir=$RUNS/ppo" "data.tokenizer=$TOKENIZER" "policy.init_from=$RUNS/sft" "reward.init_from=$RUNS/reward" \
    "data.prompts=$PROMPTS" "data.pretraining.source=$PRETRAINING" "${ppo[@]}")
echo "PPO           job $ppo_job, after $reward_job"
