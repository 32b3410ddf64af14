#!/usr/bin/env bash
# shellcheck disable=SC2317 # functions that `ask` calls
# Shared by the job scripts of this folder. A script sets STAGE and RECIPE and sources this file; the script's
# arguments are Hydra overrides. It plans the memory, runs the stage with one task per GPU, and queues the job again if
# it was interrupted or a rank died (srun.sh, restarts.sh). The environment says how to run Python and where:
#
#   VENV               a virtual environment (default: .venv of the repository, if there is one), or
#   CONTAINER_IMAGE    a container image, run with pyxis; CONTAINER_MOUNTS (default: repository and submission folder)
#   RECIPE             another file of conf/recipe/, or null for none (as well: recipe=NAME among the arguments)
#   CLUSTER            the GPUs, for the planner: a file of conf/cluster/ (default: h100_80gb)
#   PLAN=0             start without asking the planner
#   DOCTOR=1           check every node with tools/doctor.py first
#   MAX_RESTARTS=3     after a failure, starts in a row that make no new checkpoint (0: a failure ends the job)
#   EXCLUDE_FAILED=1   a restart is not placed on the nodes that failed
set -euo pipefail

readonly USER_ERROR=2 DOES_NOT_FIT=3 INTERRUPTED=75 WATCHDOG=70

fail() {
    echo "error: $*" >&2
    exit "$USER_ERROR"
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "submit this script with sbatch"
# In a batch job $0 is Slurm's copy of the script; this file was found by the path that was submitted.
REPOSITORY=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)")
NODE=${SLURMD_NODENAME:-$HOSTNAME}
# shellcheck source=slurm/restarts.sh
source "$REPOSITORY/slurm/restarts.sh" # first: it hears signals

set_environment() {
    export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
    export SLURM_EXPORT_ENV=ALL # tasks get this shell's environment, whatever sbatch --export gave to this shell
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}} # not taken over from sbatch
}

choose_python() {
    local options
    CONTAINER=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        if [[ $CONTAINER_IMAGE == [./]* && ! -e $CONTAINER_IMAGE ]]; then
            fail "CONTAINER_IMAGE=$CONTAINER_IMAGE: no such file; build it from $REPOSITORY/Dockerfile"
        fi
        ask options options_of_srun
        [[ $options == *--container-image* ]] ||
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
    [[ -f $VENV/bin/activate ]] || fail "VENV=$VENV: no virtual environment there (on node $NODE)"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
}

options_of_srun() {
    srun --help 2>&1 || true
}

# A recipe among the arguments is meant like the variable: Hydra takes only one.
take_recipe() {
    local argument
    ARGUMENTS=()
    for argument in "$@"; do
        if [[ $argument == recipe=* ]]; then
            RECIPE=${argument#recipe=}
        else
            ARGUMENTS+=("$argument")
        fi
    done
}

require_gpus() {
    if [[ ${CLUSTER:-h100_80gb} != laptop && -z ${SLURM_GPUS_ON_NODE:-}${CUDA_VISIBLE_DEVICES:-} ]]; then
        fail "node $NODE of partition $SLURM_JOB_PARTITION gives this job no GPUs: choose a partition with GPUs" \
            "(sbatch --partition=... --gpus-per-node=...), or CLUSTER=laptop to run on CPUs"
    fi
}

address_of_first() { # NODES
    local node address
    read -r node < <(scontrol show hostnames "$1")
    address=$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    echo "${address:-$node}"
}

# The batch script runs on the first node: rank 0's address and a free port are known here, also for containers.
choose_rendezvous() {
    [[ -n ${MASTER_ADDR:-} ]] || ask MASTER_ADDR address_of_first "$SLURM_JOB_NODELIST"
    undisturbed getent ahosts "$MASTER_ADDR" >/dev/null ||
        fail "rank 0's node ($MASTER_ADDR) cannot be resolved: set MASTER_ADDR to an address that all nodes reach"
    if [[ -z ${MASTER_PORT:-} ]]; then
        MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
        while port_in_use "$MASTER_PORT"; do
            MASTER_PORT=$((MASTER_PORT + 1))
        done
    elif port_in_use "$MASTER_PORT"; then
        fail "MASTER_PORT=$MASTER_PORT is in use on $NODE; leave it unset to have a free one chosen"
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

of_part() { # VARIABLE NAME PART
    local name=$2
    ((PARTS == 1)) || name="$2_HET_GROUP_$3"
    printf -v "$1" '%s' "${!name:?}"
}

common_divisor() { # VARIABLE NUMBER NUMBER
    if (($3 == 0)); then printf -v "$1" '%s' "$2"; else common_divisor "$1" "$3" $(($2 % $3)); fi
}

# One task a node, with all its GPUs, however the job shares them out.
check_nodes() {
    local part nodes names group address code=0
    for ((part = 0; part < PARTS; part++)); do
        of_part nodes SLURM_JOB_NUM_NODES "$part"
        group=() address=$MASTER_ADDR
        if ((PARTS > 1)); then
            of_part names SLURM_JOB_NODELIST "$part"
            ask address address_of_first "$names"
            group=("--het-group=$part")
        fi
        MASTER_ADDR=$address SLURM_GPUS_PER_TASK='' run TERM "${group[@]}" --ntasks-per-node=1 --ntasks="$nodes" \
            "${CONTAINER[@]}" python "$REPOSITORY/tools/doctor.py" || code=$?
        leave_if_signalled
        if ((code)); then
            [[ ${EXCLUDE_FAILED:-0} == 1 ]] || fail "the doctor does not let this job start; EXCLUDE_FAILED=1 would" \
                "queue it again on other nodes"
            conclude "$code"
        fi
    done
}

# One task, before any GPU is used: does the run fit, by its own configuration? As if all nodes had equally many GPUs:
# the most that divides those of each part.
ask_planner() {
    local code=0 tasks=0 per_node=0 part in_part nodes
    for ((part = 0; part < PARTS; part++)); do
        of_part in_part SLURM_NTASKS "$part"
        of_part nodes SLURM_JOB_NUM_NODES "$part"
        tasks=$((tasks + in_part))
        common_divisor per_node "$per_node" "$in_part"
        common_divisor per_node "$per_node" $(((in_part + nodes - 1) / nodes))
    done
    run TERM --nodes=1 --ntasks=1 "${CONTAINER[@]}" python "$REPOSITORY/tools/plan.py" --stage "$STAGE" --layouts 0 \
        "cluster=${CLUSTER:-h100_80gb}" "cluster.nodes=$((tasks / per_node))" \
        "cluster.gpus_per_node=$per_node" "recipe=$RECIPE" "$@" || code=$?
    leave_if_signalled
    case $code in
        0) require_time_for_a_step ;;
        "$DOES_NOT_FIT") fail "the planner says that this run does not fit its GPUs; PLAN=0 starts it all the same" ;;
        "$USER_ERROR") exit "$code" ;;
        *) conclude "$code" ;;
    esac
}

take_recipe "$@"
set_environment
find_parts
choose_python
require_gpus
choose_rendezvous
printf '%(%F %T)T %s, recipe %s, on %s, rendezvous %s, %s\n' -1 "$STAGE" "$RECIPE" "$SLURM_JOB_NODELIST" \
    "$MASTER_ADDR:$MASTER_PORT" "${ARGUMENTS[*]@Q}"
begin "${ARGUMENTS[@]}"
if [[ ${DOCTOR:-0} == 1 ]]; then
    check_nodes
fi
if [[ ${PLAN:-1} == 1 ]]; then
    ask_planner "${ARGUMENTS[@]}"
fi
leave_if_signalled
code=0
run USR1 "${ALL_PARTS[@]}" --kill-on-bad-exit=1 --wait=60 "${CONTAINER[@]}" python -u \
    "$REPOSITORY/examples/train_$STAGE.py" "recipe=$RECIPE" run.auto_resume=true "${ARGUMENTS[@]}" || code=$?
conclude "$code"
