#!/usr/bin/env bash
# Shared by the job scripts of this folder. A script sets STAGE and RECIPE and sources this file; the script's
# arguments are Hydra overrides. It plans the memory, runs the stage with one task per GPU, and queues the job again if
# it was interrupted. The environment says how to run Python and where:
#
#   VENV               a virtual environment (default: .venv of the repository, if there is one), or
#   CONTAINER_IMAGE    a container image, run with pyxis; CONTAINER_MOUNTS (default: repository and submission folder)
#   RECIPE             another file of conf/recipe/, or null for none
#   CLUSTER            the GPUs, for the planner: a file of conf/cluster/ (default: h100_80gb)
#   PLAN=0             start without asking the planner
#   DOCTOR=1           check every node with tools/doctor.py first
set -euo pipefail

readonly USER_ERROR=2 DOES_NOT_FIT=3 INTERRUPTED=75

fail() {
    echo "error: $*" >&2
    exit "$USER_ERROR"
}

# In a batch job $0 is Slurm's copy of the script, so the repository is found by the path that was submitted.
find_repository() {
    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    REPOSITORY=$(dirname "$here")
    export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
}

choose_python() {
    CONTAINER=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        if [[ $CONTAINER_IMAGE == [./]* && ! -e $CONTAINER_IMAGE ]]; then
            fail "CONTAINER_IMAGE=$CONTAINER_IMAGE: no such file; build it from $REPOSITORY/Dockerfile"
        fi
        [[ $(srun --help 2>&1) == *--container-image* ]] ||
            fail "CONTAINER_IMAGE is set, but this cluster's srun has no --container-image (pyxis); use VENV instead"
        CONTAINER=(
            "--container-image=$CONTAINER_IMAGE"
            "--container-mounts=${CONTAINER_MOUNTS:-$REPOSITORY:$REPOSITORY,$PWD:$PWD}"
            "--container-workdir=$PWD"
        )
        return
    fi
    if [[ -z ${VENV:-} && -d $REPOSITORY/.venv ]]; then
        VENV=$REPOSITORY/.venv
    fi
    [[ -n ${VENV:-} ]] || fail "set VENV (a virtual environment) or CONTAINER_IMAGE (a container): docs/cluster.md"
    [[ -f $VENV/bin/activate ]] || fail "VENV=$VENV: no virtual environment there (on node $(hostname))"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
}

require_gpus() {
    if [[ ${CLUSTER:-h100_80gb} != laptop && -z ${SLURM_GPUS_ON_NODE:-}${CUDA_VISIBLE_DEVICES:-} ]]; then
        fail "node $(hostname) of partition $SLURM_JOB_PARTITION gives this job no GPUs: choose a partition with GPUs" \
            "(sbatch --partition=... --gpus-per-node=...), or CLUSTER=laptop to run on CPUs"
    fi
}

# The batch script runs on the first node: rank 0's address and a free port are known here, also for containers.
choose_rendezvous() {
    local node
    read -r node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [[ -z ${MASTER_ADDR:-} ]]; then
        MASTER_ADDR=$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        MASTER_ADDR=${MASTER_ADDR:-$node}
    fi
    getent ahosts "$MASTER_ADDR" >/dev/null ||
        fail "node $node ($MASTER_ADDR) cannot be resolved: set MASTER_ADDR to an address that all nodes reach"
    if [[ -z ${MASTER_PORT:-} ]]; then
        MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
        while port_in_use "$MASTER_PORT"; do
            MASTER_PORT=$((MASTER_PORT + 1))
        done
    elif port_in_use "$MASTER_PORT"; then
        fail "MASTER_PORT=$MASTER_PORT is in use on $node; leave it unset to have a free one chosen"
    fi
    export MASTER_ADDR MASTER_PORT
}

port_in_use() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# A heterogeneous job has parts with variables of their own; any other job is one part.
find_parts() {
    PARTS=${SLURM_HET_SIZE:-1} ALL_PARTS=()
    if ((PARTS > 1)); then
        ALL_PARTS=("--het-group=0-$((PARTS - 1))")
    fi
}

of_part() { # NAME PART
    local name="$1_HET_GROUP_$2"
    echo "${!name}"
}

common_divisor() {
    if (($2 == 0)); then echo "$1"; else common_divisor "$2" $(($1 % $2)); fi
}

check_nodes() {
    local part
    if ((PARTS == 1)); then
        srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" "${CONTAINER[@]}" python "$REPOSITORY/tools/doctor.py"
        return
    fi
    for ((part = 0; part < PARTS; part++)); do
        srun "--het-group=$part" --ntasks-per-node=1 --ntasks="$(of_part SLURM_JOB_NUM_NODES "$part")" \
            "${CONTAINER[@]}" python "$REPOSITORY/tools/doctor.py"
    done
}

# One task, before any GPU is used: does the run fit, by its own configuration?
ask_planner() {
    local code=0 per_node=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-1} / SLURM_JOB_NUM_NODES))}
    local tasks=$((per_node * SLURM_JOB_NUM_NODES)) part
    if ((PARTS > 1)); then # as if all nodes had equally many GPUs: the most that divides each part's
        per_node=0 tasks=0
        for ((part = 0; part < PARTS; part++)); do
            tasks=$((tasks + $(of_part SLURM_NTASKS "$part")))
            per_node=$(common_divisor "$per_node" \
                $(($(of_part SLURM_NTASKS "$part") / $(of_part SLURM_JOB_NUM_NODES "$part"))))
        done
    fi
    srun --nodes=1 --ntasks=1 "${CONTAINER[@]}" python "$REPOSITORY/tools/plan.py" --stage "$STAGE" --layouts 0 \
        "cluster=${CLUSTER:-h100_80gb}" "cluster.nodes=$((tasks / per_node))" \
        "cluster.gpus_per_node=$per_node" "recipe=$RECIPE" "$@" || code=$?
    case $code in
        0) ;;
        "$DOES_NOT_FIT") fail "the planner says that this run does not fit its GPUs; PLAN=0 starts it all the same" ;;
        *) exit "$code" ;;
    esac
}

# Signals come to this shell (--signal=B:...), and from here to the tasks, which save and exit with INTERRUPTED.
run_stage() {
    local code=0 signalled=0 last
    srun "${ALL_PARTS[@]}" --kill-on-bad-exit=1 "${CONTAINER[@]}" python -u "$REPOSITORY/examples/train_$STAGE.py" \
        "recipe=$RECIPE" run.auto_resume=true "$@" &
    local tasks=$! again=1
    trap 'signalled=1 again=1; kill -USR1 "$tasks" 2>/dev/null || true' USR1 TERM
    while ((again)); do # a signal ends `wait` before the tasks have
        again=0
        last=$code code=0
        wait "$tasks" || code=$?
        ((code != 127)) || code=$last # they had ended when the signal came
    done
    # Tasks that were signalled before they could handle it end by the signal: they continue from the last checkpoint.
    if ((code == INTERRUPTED || (signalled && code > 128))); then
        queue_again
    fi
    return "$code"
}

# `scancel` sends the same signal as a time limit or a preemption; only the job's state tells them apart.
queue_again() {
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
    if [[ $state == RUNNING ]]; then
        echo "interrupted: job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID" || echo "it could not be (is it being requeued already?)" >&2
    else
        echo "interrupted: job $SLURM_JOB_ID is ${state:-gone}: not queued again"
    fi
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "submit this script with sbatch"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}} # not taken over from sbatch
find_repository
find_parts
choose_python
require_gpus
choose_rendezvous
echo "$(date '+%F %T') $STAGE, recipe $RECIPE, on $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT, $*"
if [[ ${DOCTOR:-0} == 1 ]]; then
    check_nodes
fi
if [[ ${PLAN:-1} == 1 ]]; then
    ask_planner "$@"
fi
run_stage "$@"
