#!/usr/bin/env bash
# shellcheck disable=SC2154,SC2317,SC2034 # variables of common.sh; functions that `ask` calls, and what it sets
# Sourced by common.sh: decides at the end of a start whether the job is queued again.
#
# Each end but a success is a line of run.dir/restarts.tsv, and these lines are what the budget is counted from: a job that
# makes checkpoints is queued again for as long as it does.

START=$((${SLURM_RESTART_COUNT:-0} + 1))
WARNING=$(sed -n 's/^#SBATCH .*--signal=B:USR1@\([0-9]*\).*/\1/p' "$0" | tail -n 1) # unless sbatch was given another
LIMIT='' PLANNED_STEP=0 RUN_DIR='' CONCLUDED=''
# shellcheck source=slurm/srun.sh
source "${BASH_SOURCE[0]%/*}/srun.sh" # signals are heard from here on

# What there is at the beginning of a start, to see afterwards what it came to.
begin() { # OVERRIDES...
    local argument ended
    for argument in "$@"; do
        argument=${argument#+} argument=${argument#+} # Hydra's ++run.dir=
        [[ $argument != run.dir=* ]] || RUN_DIR=${argument#run.dir=}
    done
    if [[ -z $RUN_DIR || $RUN_DIR == *[\'\"\$\\]* ]]; then # in a file of settings; Hydra's quotes, or another key's value
        ask argument composed_run_dir "$@"
        if [[ -z $argument && -n $SIGNALLED ]]; then # which has ended its task
            ask argument composed_run_dir "$@"
        fi
        RUN_DIR=${argument#\'} RUN_DIR=${RUN_DIR%\'}
    fi
    [[ -z $RUN_DIR || $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR # awk would take "a=b/file" for an assignment
    ask LIMIT time_of_job %l
    ask FROM newest_checkpoint
    ask METRICS state_of_metrics
    if ((START > 1)); then
        ask ended last_end
        echo "start $START of job $JOB, from ${FROM:-the beginning}$ended"
    fi
}

composed_run_dir() { # OVERRIDES...
    srun --nodes=1 --ntasks=1 "${CONTAINER[@]}" python "$REPOSITORY/examples/train_$STAGE.py" --cfg "recipe=$RECIPE" \
        "$@" 2>/dev/null | sed -n "/^run:/,/^[^ ]/s/^  dir: //p"
}

newest_checkpoint() { # anything else in that file is no number, and bash runs what it finds in one: first[$(...)]
    local name
    name=$(head -n 1 "$RUN_DIR/checkpoints/latest" 2>/dev/null) || true
    [[ ! $name =~ ^step_[0-9]+$ ]] || echo "$name"
}

state_of_metrics() {
    stat -c '%i %s %y' "$RUN_DIR/metrics.jsonl" 2>/dev/null || true
}

steps_done() { # by this start, after the checkpoint that it began from
    local first=${FROM#step_} last=0
    if [[ $(state_of_metrics) != "$METRICS" ]]; then
        last=$(tail -n 1 "$RUN_DIR/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\).*/\1/p')
    fi
    echo $((last > first ? last - first : 0))
}

last_end() {
    awk -F '\t' -v job="$JOB" '$2 == job { cause = $8 } END { if (cause) print "; it ended: " cause }' \
        "$RUN_DIR/restarts.tsv" 2>/dev/null || true
}

# A time limit that leaves no time for a step is refused: before a GPU works, if it is shorter than a step,
require_time_for_a_step() {
    local printed
    ask printed planned_step
    printed=${printed//,/}
    PLANNED_STEP=${printed%.*}
    if [[ -n $LIMIT ]] && ((LIMIT <= PLANNED_STEP)); then
        fail "the time limit (sbatch --time) of $LIMIT s is not longer than one step, which is planned to take" \
            "$PLANNED_STEP s"
    fi
}

planned_step() {
    sed -n 's/.* steps of \([0-9.,]*\) s = .*/\1/p' "$MESSAGES" | tail -n 1
}

# or else when its warning comes, half a minute early at most: only then is it known how long before the limit.
refuse_useless_limit() {
    local after steps
    [[ $SIGNALLED == USR1 && -n $LIMIT && -n $LEFT ]] || return 0
    after=$((LIMIT - LEFT))
    if ((after + 30 <= PLANNED_STEP || (after <= 31 && LIMIT <= ${WARNING:-0} + PLANNED_STEP))); then
        steps='some steps'
        ((PLANNED_STEP == 0)) || steps+=", of $PLANNED_STEP s each as planned"
        fail "the time limit (sbatch --time) of $LIMIT s leaves no time for a step: its warning came after $after s. Give" \
            "a --time longer than the warning (sbatch --signal=B:USR1@SECONDS, here ${WARNING:-none} in the script) and" \
            "$steps"
    fi
}

# Where the planner was not asked, or is wrong, a limit is found out by what it leaves time for.
if_in_first_step() {
    if [[ $SIGNALLED == USR1 && -n $LEFT && -n $WARNING ]] && ((LEFT <= WARNING + 31 && $(steps_done) <= 1)); then
        echo " in the first step, by the warning before the time limit: --time is too short, or --signal too early"
    fi
}

leave_if_signalled() {
    [[ -z $SIGNALLED ]] || conclude "$INTERRUPTED"
}

# The end of a start: what it came to, and whether there is another one.
conclude() { # CODE
    local code=$1 state cause polite=0
    trap '' TERM USR1 # what ends now ends as it has begun
    if ((code == 0 || code == USER_ERROR)) || [[ -n $CONCLUDED ]]; then
        exit "$code"
    fi
    # Tasks that were signalled before they could handle it end by the signal.
    if ((code == INTERRUPTED)) || [[ -n $SIGNALLED && $code -gt 128 ]]; then
        polite=1
    fi
    state=$(state_of_job)
    cause=$(first_end)
    ((polite)) && cause="asked to stop$(if_in_first_step)"
    record "$code" "${cause:-exit code $code}"
    # `scancel` sends the same signal as a time limit or a preemption; only the job's state tells them apart.
    if [[ $state != RUNNING ]]; then
        echo "interrupted: job $JOB is ${state:-gone}: not queued again by this script"
        exit "$code"
    fi
    ((polite == 0)) || refuse_useless_limit
    ((polite)) || echo "job $JOB, start $START, failed: ${cause:-exit code $code}" >&2
    go_on "$code" "$polite" && queue_again "$code"
    exit "$code"
}

state_of_job() { # a controller that is busy is asked again: a job whose script runs has a state
    local state=''
    state=$(of_job %T)
    if [[ -z $state ]]; then
        sleep 10
        state=$(of_job %T)
    fi
    echo "$state"
}

conclude_at_the_limit() {
    trap '' TERM USR1
    local earlier=$((2 * (WARNING > PLANNED_STEP ? WARNING : PLANNED_STEP)))
    [[ -z $CONCLUDED ]] || return 0
    echo "job $JOB reached its time limit in the middle of a step: the warning before it has to leave time for a step" \
        "and a checkpoint; sbatch --signal=B:USR1@$((earlier > 600 ? earlier : 600)) asks for an earlier one" >&2
    record "$INTERRUPTED" "the time limit came in the middle of a step"
    CONCLUDED=1
    if go_on "$INTERRUPTED" 0; then
        queue_again "$INTERRUPTED"
    fi
}

readonly COLUMNS_OF_RECORD="ended\tjob\tstart\tfrom\tcheckpoint\tsteps\tcode\tcause"

record() { # CODE CAUSE
    local file=$RUN_DIR/restarts.tsv newest
    newest=$(newest_checkpoint)
    [[ -n $RUN_DIR ]] && mkdir -p "$RUN_DIR" || return 0
    [[ -e $file ]] || printf '%b\n' "$COLUMNS_OF_RECORD" >"$file"
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$(date '+%F %T')" "$JOB" "$START" "${FROM:--}" \
        "${newest:--}" "$(steps_done)" "$1" "$2" >>"$file"
}

# Of this job's last starts, how many in a row made no step, and no checkpoint.
in_a_row() {
    awk -F '\t' -v job="$JOB" '
        $2 == job { steps = $6 > 0 && $8 !~ /in the first step/ ? 0 : steps + 1; checkpoints = $4 != $5 ? 0 : checkpoints + 1 }
        END { print steps + 0, checkpoints + 0 }' "$RUN_DIR/restarts.tsv"
}

go_on() { # CODE POLITE: whether another start is worth its GPUs
    local without_step without_checkpoint allowed=${MAX_RESTARTS:-3} why=''
    if (($2 && allowed < 3)); then
        allowed=3 # for a disk that is full, or a site that preempts all the time
    fi
    if [[ ! -w $RUN_DIR/restarts.tsv ]]; then
        why="run.dir=$RUN_DIR takes no record of its restarts"
    else
        read -r without_step without_checkpoint < <(in_a_row)
        if ((without_step > 1)); then
            why="$without_step starts in a row made no progress"
        elif ((allowed == 0 || without_checkpoint > allowed)); then
            why="$without_checkpoint starts in a row made no new checkpoint, and MAX_RESTARTS=$allowed"
        fi
    fi
    [[ -z $why ]] && return 0
    echo "job $JOB is not queued again: $why (causes: $RUN_DIR/restarts.tsv)" >&2
    return 1
}

queue_again() { # CODE
    local nodes='' before how=requeue
    trap '' TERM USR1 # Slurm signals this shell and its children as soon as it has queued the job
    if [[ ${EXCLUDE_FAILED:-0} == 1 ]]; then
        nodes=$(failed_nodes "$1")
    fi
    [[ -z $nodes ]] || how=requeuehold # until it is known where not to start
    echo "job $JOB is queued again${nodes:+, not on $nodes}"
    if ! scontrol "$how" "$JOB"; then
        echo "it could not be (is it being requeued already?)" >&2
        return
    fi
    if [[ -n $nodes ]]; then
        before=$(scontrol show job "$JOB" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p' | head -n 1)
        [[ $before == "(null)" ]] && before=''
        scontrol update "JobId=$JOB" "ExcNodeList=${before:+$before,}$nodes" ||
            echo "$nodes could not be excluded" >&2
        scontrol release "$JOB" || { sleep 3 && scontrol release "$JOB"; } ||
            echo "job $JOB is held: scontrol release $JOB" >&2
    fi
}
