"""Goodput: kills ranks of a PPO job under a real Slurm, and says how much of its time was training that counts.

    python tests/goodput_bench.py --mtbf 30 --steps 30 --save-every 1 5

Times between kills are drawn from an exponential distribution; each kill hits one rank on either of two nodes with
SIGKILL, whatever it is doing. The job is slurm/ppo_175b.sh, scaled down by overrides; nothing else restarts it. Queueing
is left out: what is counted are seconds in which the job holds its nodes. The table is Markdown.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "slurm"))

from cluster import FINISHED, Cluster
from kill_bench import Stage
from recipe import Recipe, make_data

SCRIPT = Path(__file__).resolve().parents[1] / "slurm" / "ppo_175b.sh"
FLAGS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
SMALL = ["recipe=null", "model=null", "model@critic_model=null", "precision=fp32", "watchdog.timeout_s=20"]
HEADER = (
    "| checkpoint every | kills | restarts | steps | steps made twice | held, s | training, s | productive |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass
class Trial:
    """A job from its submission to its end."""

    cluster: Cluster
    number: int
    folder: Path
    draw: random.Random
    mtbf: float
    held_s: float = 0.0
    """Seconds in which it had its nodes."""
    kills: int = 0
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.draw.expovariate(1 / self.mtbf)

    def run(self, limit: float) -> str:
        """Kill ranks until the job has ended; returns its last state."""
        began = last = time.monotonic()
        while (job := self.cluster.job(self.number)).state not in FINISHED:
            now = time.monotonic()
            assert now - began < limit, f"{job.state} after {limit:g} s\n{self.cluster.log(self.number)}"
            if job.state == "RUNNING":
                self.held_s += now - last
            last = now
            ranks = ranks_of(self.number)
            if self.held_s > self._next and ranks:
                os.kill(self.draw.choice(ranks), signal.SIGKILL)
                self.kills += 1
                self._next = self.held_s + self.draw.expovariate(1 / self.mtbf)
            self.cluster.hurry()
            time.sleep(0.2)
        return job.state

    def row(self, save_every: int) -> str:
        steps = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        training = sum(step["time/step_s"] for step in steps)
        starts = [line.split("\t") for line in self._record()]
        twice = sum(number(line[3]) + int(line[5]) - number(line[4]) for line in starts)
        cells = save_every, self.kills, len(starts), len(steps), twice, f"{self.held_s:.0f}", f"{training:.0f}"
        return f"| {' | '.join(map(str, cells))} | {training / self.held_s:.0%} |"

    def _record(self) -> list[str]:
        file = self.folder / "restarts.tsv"
        return file.read_text().splitlines()[1:] if file.exists() else []


def number(checkpoint: str) -> int:
    """step_7 -> 7; the beginning is 0."""
    return int(checkpoint.removeprefix("step_")) if checkpoint != "-" else 0


def ranks_of(job: int) -> list[int]:
    """The processes of the job's stage."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = b"python" in words[0] and any(word.endswith(b"/train_ppo.py") for word in words[:4])
        if is_rank and f"SLURM_JOB_ID={job}".encode() in variables:
            found.append(int(process.name))
    return found


def bench(recipe: Recipe, cluster: Cluster, options: argparse.Namespace) -> bool:
    """A row for each interval of checkpoints; whether all jobs were completed."""
    print(HEADER, flush=True)
    completed = True
    for save_every in options.save_every:
        name = f"goodput_{save_every}_{time.time_ns()}"
        overrides = recipe.ppo(
            name, recipe.root / "sft", recipe.root / "reward_model", *SMALL,
            f"ppo.iterations={options.steps}", f"run.save_every={save_every}", *options.set,
        )  # fmt: skip
        draw = random.Random(options.seed)
        submitted = cluster.submit(SCRIPT, *overrides, flags=FLAGS, PLAN="0", MAX_RESTARTS=str(options.max_restarts))
        trial = Trial(cluster, submitted, recipe.root / name, draw, options.mtbf)
        state = trial.run(options.limit)
        print(trial.row(save_every), flush=True)
        if state != "COMPLETED":
            print(cluster.log(submitted), file=sys.stderr)
            completed = False
    return completed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf", type=float, default=30.0, help="mean seconds between kills, while the job runs")
    parser.add_argument("--steps", type=int, default=30, help="of PPO")
    parser.add_argument("--save-every", type=int, nargs="+", default=[1, 5], help="steps between checkpoints")
    parser.add_argument("--max-restarts", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for a job to end")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--keep", type=Path, help="a folder for data and starting models, to use them again")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="goodput_", dir="/tmp"))  # short: Slurm's sockets are in it
    try:
        recipe = Recipe(options.keep or folder)
        if not (recipe.root / "reward_model" / "checkpoints").exists():
            recipe.root.mkdir(parents=True, exist_ok=True)
            make_data(recipe.root)
            Stage("sft", recipe, 1, ("run.save_every=0",)).finish("sft")
            Stage("reward_model", recipe, 1, ("run.save_every=0",)).finish("reward_model")
        (folder / "slurm").mkdir()
        with Cluster(folder / "slurm") as cluster:
            return 0 if bench(recipe, cluster, options) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
