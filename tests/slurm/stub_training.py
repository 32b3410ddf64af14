"""Stands in for examples/train_*.py where the scripts are tested: ranks without models, with a run folder.

stub.steps=3         steps to make; each is a line of metrics.jsonl and, unless stub.save=0, a checkpoint
stub.first, stub.second, ... = ACTION[@STEP]   what happens in that start when so many steps of it are done:
    kill: SIGKILL to the last rank; exit:CODE: it leaves with the code; mistake: all ranks leave with 2;
    watchdog: all leave with 70, and it names the last rank; hang: the step never ends;
    lost: the last rank dies together with the slurmstepd of its node
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STARTS = ("first", "second", "third", "fourth", "fifth", "sixth")
SECONDS_A_STEP = 0.3


def main() -> None:
    folder = run_dir()
    if "--cfg" in sys.argv:
        print(f"run:\n  dir: {folder}\n  seed: 1")
        return
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    latest = folder / "checkpoints" / "latest"
    done = begun = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
    action, _, after = given(f"stub.{STARTS[min(start, 5)]}", "none").partition("@")
    with (folder / "ranks.txt").open("a") as file:
        print(start, rank, world, os.environ.get("SLURMD_NODENAME"), *sys.argv[1:], sep="|", file=file)
    while done < int(given("stub.steps", "3")):
        if done - begun == int(after or 0) and action != "none":
            meet(folder / f"met.{start}", rank, world)
            act(action, rank, world)
        time.sleep(SECONDS_A_STEP)
        done += 1
        if rank == 0:
            with (folder / "metrics.jsonl").open("a") as file:
                print(json.dumps({"step": done}), file=file)
            if given("stub.save", "1") == "1" or asked:
                latest.write_text(f"step_{done}")
        if asked:
            time.sleep(0 if rank else 0.5)
            sys.exit(0 if rank else 75)
    print(f"rank {rank} of {world} is done")


def meet(folder: Path, rank: int, world: int) -> None:
    """Wait for the other ranks, as a step of a training does: a slow rank would take Slurm's TERM for a polite one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on: as if the watchdog ended them
    folder.mkdir(exist_ok=True)
    (folder / str(rank)).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < world and time.monotonic() < deadline:
        time.sleep(0.02)


def act(action: str, rank: int, world: int) -> None:
    last = rank == world - 1
    if action == "mistake":
        time.sleep(0.2 * rank)
        print("error: data.prompts=nowhere.jsonl: no such file", file=sys.stderr, flush=True)
        sys.exit(2)
    if action == "watchdog":
        if last:
            where = f"rank {rank} on {os.environ['SLURMD_NODENAME']}"
            said = f"rank {rank} is dead or frozen: nothing was heard of it for 2 s; last seen: {where}: role policy, step 1"
            print(f"CRITICAL watchdog: {said}. rank 0 on elsewhere: role policy", file=sys.stderr, flush=True)
        sys.exit(70)
    if action == "hang" or not last:
        time.sleep(600 if action != "lost" else 3)
        sys.exit(70)  # as the watchdog
    if action == "lost":
        os.kill(os.getppid(), signal.SIGKILL)
    if action in ("kill", "lost"):
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(action.removeprefix("exit:")))


def run_dir() -> Path:
    """From an override, else from a file of settings."""
    files = [Path(given(key)) for key in ("config", "recipe") if given(key).endswith(".yaml")]
    in_files = [path.read_text().strip().removeprefix("run.dir: ") for path in files]
    dir = next(filter(None, [given("run.dir"), *in_files]))
    return Path(dir.replace("${oc.env:SLURM_ARRAY_TASK_ID}", os.environ.get("SLURM_ARRAY_TASK_ID", "")))


def given(key: str, default: str = "") -> str:
    return next((a.partition("=")[2] for a in reversed(sys.argv) if a.startswith(f"{key}=")), default)


if __name__ == "__main__":
    main()
