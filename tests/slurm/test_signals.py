"""A signal at the worst moments: while any of the programs runs that a job script calls. No Slurm: its commands are stand-ins.

Slurm signals all processes of a job at once, so a program dies in the middle of its work, and so do the subshells above it.
Whatever it was, the script has heard the signal, and the job is queued again.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
PROGRAMS = "awk cat dirname getent grep head mkdir mkfifo mktemp scontrol sed squeue srun stat tail".split()
# What stands for Slurm's own: enough of each for a job of one node.
OWN = {
    "squeue": 'case "$*" in *%T*) echo RUNNING ;; *%r*) echo None ;; *%l*) echo 1:00:00 ;; *%L*) echo 50:00 ;; esac',
    "scontrol": 'case "$*" in "show hostnames"*) echo n1 ;; "show node"*) echo "  NodeAddr=127.0.0.1 x" ;; esac',
    "getent": "exit 0",
    "srun": """case "$*" in
        *--help*) echo --container-image ;;
        *doctor.py*) ;;
        *--cfg*) printf 'run:\\n  dir: %s\\nseed: 1\\n' "$RUN" ;;
        *plan.py*) echo "rollout: 3 steps of 0.5 s = 2 s" ;;
        *) trap 'exit 75' TERM USR1
           for _ in {1..40}; do sleep 0.05; done
           touch "$RUN.done" ;;
    esac""",
}
# $0 is the name, and calls are numbered over all names.
PROGRAM = """#!/bin/bash
exec 9>>"$CALLS.lock"; flock 9
echo "${{0##*/}} $*" >> "$CALLS"
number=$(wc -l < "$CALLS")
exec 9>&-
if [[ $number == "$STRIKE" ]]; then
    kill -TERM 0
    sleep 1
fi
{work}
"""


def run(folder: Path, strike: int, name: str = "undisturbed", first: str = "") -> tuple[int, list[str], str]:
    """A job in which the process group is signalled during a call of a program: exit code, calls, output."""
    bin, calls = folder / "bin", folder / f"{name}.calls"
    run_dir = folder / name
    script = folder / f"{name}.sh"
    script.write_text(f'#SBATCH --signal=B:USR1@600\nSTAGE=ppo RECIPE=none\n{first}\nsource "{SLURM}/common.sh"\n')
    environment = {
        "PATH": f"{bin}:/usr/bin:/bin",
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"},
        **{"CLUSTER": "laptop", "VENV": str(folder / "venv"), "SLURM_JOB_PARTITION": "all", "EXCLUDE_FAILED": "1"},
        **{"CALLS": str(calls), "STRIKE": str(strike), "RUN": str(run_dir), "HOME": str(folder)},
    }
    done = subprocess.run(
        ["/bin/bash", script, f"run.dir='{run_dir}'"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    for name in PROGRAMS:
        real = next(path for folder in ("/usr/bin", "/bin") if (path := Path(folder, name)).exists() or name in OWN)
        program = tmp_path / "bin" / name
        program.write_text(PROGRAM.format(work=OWN.get(name, f'exec {real} "$@"')))
        program.chmod(0o755)
    return tmp_path


def test_a_signal_at_any_moment_queues_the_job_again(programs: Path) -> None:
    code, calls, output = run(programs, strike=0)
    assert code == 0, output
    assert [call.split()[0] for call in calls].count("srun") == 3, "run.dir, planner, training"
    first = 1 + next(number for number, call in enumerate(calls, 1) if call.startswith("mktemp"))
    # The programs of a launch are started side by side, in no order: the number of one is that of another next time.
    launch = 1 + next(number for number, call in enumerate(calls, 1) if call.startswith("mkfifo"))
    moments = [*range(first, len(calls) + 1), *[launch, launch + 1, launch + 2] * 5]
    with ThreadPoolExecutor(max(os.cpu_count() or 1, 2)) as pool:
        ends = list(pool.map(lambda start: run(programs, start[1], name=f"start {start[0]}"), enumerate(moments)))
    wrong = {}
    for number, (strike, (code, done, output)) in enumerate(zip(moments, ends, strict=True)):
        again = done.count("scontrol requeue 7")
        trained = (programs / f"start {number}.done").exists()
        # Tasks may have ended by the signal before they could handle it, or may have been done.
        if (code, again) not in ([(0, 0)] if trained else [(75, 1), (143, 1)]):
            wrong[f"{strike}: {done[strike - 1]}"] = (code, done[strike:], output)
    assert not wrong


TRACE = "PS4='+ $BASH_SUBSHELL ${FUNCNAME[*]}: '; set -x\n"
TRACED = re.compile(r"(\++) (\d+) ([\w ]*): (.*)")
# A job of one part; one of two parts, whose nodes are checked first, in a container.
JOBS = {
    "plain": "",
    "parts": "DOCTOR=1 CONTAINER_IMAGE=image SLURM_HET_SIZE=2 "
    + " ".join(
        f"SLURM_JOB_NUM_NODES_HET_GROUP_{n}=1 SLURM_JOB_NODELIST_HET_GROUP_{n}=n1 SLURM_NTASKS_HET_GROUP_{n}=2"
        for n in range(2)
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_shell_that_hears_signals_substitutes_no_commands(programs: Path, job: str) -> None:
    """Bash 5.2 would parse a trap as a part of what is in `$(...)`; a substitution is one level (a plus) deeper."""
    first = f"{JOBS[job]}\n{TRACE}"
    _, calls, output = run(programs, 0, first=first)
    traces = [output]
    launch = 1 + next(number for number, call in enumerate(calls, 1) if call.startswith("mkfifo"))
    traces.append(run(programs, launch, name="signalled", first=first)[2])
    for trace in traces:
        lines = [found.groups() for found in map(TRACED.fullmatch, trace.splitlines()) if found]
        level = next(pluses for pluses, _, _, command in lines if command.startswith("take_recipe"))
        hears, heard = False, 0
        for pluses, depth, functions, command in lines:
            if depth == "0" and command.startswith("trap "):
                hears = "hear" in command
            asked = {"ask", "undisturbed"} & set(functions.split())
            heard += hears and depth != "0"
            assert not hears or depth == "0" or asked or pluses == level, (functions, command)
        assert heard, "subshells of a shell that hears signals"
    assert not any(" hear " in line for line in traces[0].splitlines() if line.startswith("+")), "undisturbed"
    assert any(" hear " in line for line in traces[1].splitlines() if line.startswith("+"))
