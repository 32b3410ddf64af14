#!/usr/bin/env bash
# shellcheck disable=SC2154,SC2317,SC2034 # variables of common.sh; functions that `ask` calls, and what it sets
# Sourced by restarts.sh: runs srun and hears signals.
#
# Signals (--signal=B:..., a time limit, preemption, requeue, scancel) come to this shell, and go from here to the tasks,
# which save and exit with INTERRUPTED.

# An array's tasks have ids of their own; SLURM_JOB_ID of one of them means the whole array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
SECONDS_TO_END=60 # for the others when a task has ended
ASIDE=$(mktemp -d)
MESSAGES=$ASIDE/srun
SRUN='' FORWARD=TERM HEARD=0 SIGNALLED='' LEFT=''
trap '[[ $BASHPID != "$$" ]] || rm -rf "$ASIDE"' EXIT # a child that dies before it has become a program runs it, too
trap 'hear USR1' USR1
trap 'hear TERM' TERM

hear() { # SIGNAL
    local reason=''
    HEARD=1
    if [[ -z $SIGNALLED ]]; then
        SIGNALLED=$1
        ask LEFT time_of_job %L
    fi
    forward
    [[ $1 != TERM ]] || ask reason of_job %r
    if [[ $reason == TimeLimit ]]; then
        conclude_at_the_limit # now: there may be no time later
    fi
}

forward() { # what was heard, to the tasks
    if [[ -n $SRUN && -n $SIGNALLED ]]; then
        kill "-$FORWARD" "$SRUN" 2>/dev/null || true
    fi
}

# Slurm signals all processes of the job, and so what works for this shell. A subshell has none of its traps: without
# these two, a command that is signalled would end the script, or be taken for an answer.
undisturbed() { # PROGRAM ARGUMENTS...
    (
        trap '' TERM USR1
        exec "$@"
    )
}

# Bash 5.2 parses $(...) again whenever it expands it, and a trap that is due just then is parsed as a part of it: "trap:
# unexpected EOF", the end of the script. The shell that hears signals therefore asks through files.
ask() { # VARIABLE FUNCTION ARGUMENTS...: what the function prints, or nothing if it fails
    local answer=$ASIDE/$1
    (
        trap '' TERM USR1
        "${@:2}"
    ) >"$answer" || : >"$answer"
    IFS= read -r -d '' "$1" <"$answer" || true # there is no NUL to find
    printf -v "$1" '%s' "${!1%$'\n'}"
}

of_job() { # FORMAT of squeue
    squeue --noheader --jobs="$JOB" --format="$1" 2>/dev/null | head -n 1 || true
}

time_of_job() { # FORMAT of squeue -> seconds
    seconds_of "$(of_job "$1")"
}

seconds_of() { # [DAYS-][[HOURS:]MINUTES:]SECONDS -> seconds; nothing if there is no limit
    local days=0 time=$1 total=0 part
    [[ $time =~ ^([0-9]+-)?[0-9:]+$ ]] || return 0
    if [[ $time == *-* ]]; then
        days=${time%%-*} time=${time#*-}
    fi
    for part in ${time//:/ }; do
        total=$((60 * total + 10#$part))
    done
    echo $((86400 * days + total))
}

# srun with these arguments. What srun and slurmstepd say themselves, lines for every task of a large job, is kept
# aside: the log is the tasks' own words.
run() { # SIGNAL-FOR-SRUN ARGUMENTS...
    local code=0 last told reader
    leave_if_signalled
    FORWARD=$1 HEARD=1
    shift
    [[ -p $ASIDE/pipe ]] || undisturbed mkfifo "$ASIDE/pipe"
    exec 7<>"$ASIDE/pipe"
    exec 8<"$ASIDE/pipe" # here: who opens an end by itself waits for the other
    (
        trap '' TERM USR1
        exec sed -u -n -e "/^srun: /w $MESSAGES" -e "/[Aa]t fault: node\|watchdog: /w $MESSAGES" \
            -e "/ steps of [0-9.,]* s = /w $MESSAGES" -e '/^srun: \|^slurmstepd[^:]*: error: \*\*\*\|^Terminated$/!p'
    ) <&8 7>&- & # in parentheses: a function's shell would keep what is closed here
    reader=$!
    srun "$@" >&7 2>&1 7>&- 8<&- &
    SRUN=$!
    (end_if_lost "$SRUN") >/dev/null 2>&1 7>&- 8<&- & # ends by itself when srun has
    if [[ -n $SIGNALLED ]]; then # before there was an srun
        sleep 1 # until the child has become one
        forward
    fi
    while ((HEARD)); do # a signal ends `wait` before srun has ended
        HEARD=0 last=$code code=0
        wait "$SRUN" 2>/dev/null || code=$?
        ((code != 127)) || code=$last # it had ended when the signal came
        ! ended_unseen "$SRUN" || break
    done
    SRUN=''
    exec 7>&- 8<&-
    while kill -0 "$reader" 2>/dev/null; do # a signal ends this `wait`, too
        wait "$reader" 2>/dev/null || true
    done
    ask told code_of_tasks "$code"
    return "${told:-$code}"
}

# A process whose end comes together with a signal that interrupts `wait` is lost to bash: it takes it for a running one,
# and waits for it without end.
ended_unseen() { # PROCESS
    ! kill -0 "$1" 2>/dev/null || return 1
    jobs -pr >"$ASIDE/jobs"
    undisturbed grep -qx "$1" "$ASIDE/jobs"
}

# srun waits for the tasks of a slurmstepd that is gone for as long as the job lasts.
end_if_lost() { # PROCESS; in the background
    trap '' TERM USR1
    until grep -qE '^srun: (error: [^ ]+: tasks? [0-9]|First task exited)' "$MESSAGES" 2>/dev/null; do
        sleep 5
        kill -0 "$1" 2>/dev/null || return 0
    done
    sleep "$SECONDS_TO_END"
    kill -0 "$1" 2>/dev/null || return 0
    echo "srun: error: it still waited for tasks $SECONDS_TO_END s after the first one had ended" >>"$MESSAGES"
    kill -KILL "$1" 2>/dev/null || true
}

# srun's code is the largest of its tasks', and those that it ends itself have large ones. A task that names a mistake
# speaks for all, else the first one to end.
code_of_tasks() { # CODE-OF-SRUN
    if grep -q "Exited with exit code $USER_ERROR\$" "$MESSAGES"; then
        echo "$USER_ERROR"
        return
    fi
    case $(first_end) in
        *"exit code "*) first_end | sed 's/.*exit code //' ;;
        *Killed* | *"Out Of Memory"*) echo 137 ;;
        *"Segmentation fault"*) echo 139 ;;
        *) echo "$1" ;;
    esac
}

first_end() { # NODE: task NUMBER: how it ended
    sed -n '/^srun: error: [^ ]*: tasks\? [0-9]/{s/^srun: error: //p;q}' "$MESSAGES"
}

failed_nodes() { # CODE: the nodes that the rendezvous or the watchdog names, else that of the first task to end
    local named
    named=$(sed -n -e 's/.*[Aa]t fault: node \([^ ]*\)\.$/\1/p' \
        -e 's/.*watchdog: .*last seen: rank [0-9]* on \([^: ]*\): .*/\1/p' \
        -e 's/.*watchdog: \(hangs outside\|went another way\)[^:]*: \(others[^:]*: \)\?rank [0-9]* on \([^: ]*\): .*/\3/p' \
        "$MESSAGES" | sort -u | paste -sd,)
    if [[ -z $named ]] && (($1 != WATCHDOG)); then
        named=$(first_end)
    fi
    echo "${named%%:*}"
}
