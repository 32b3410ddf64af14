"""Kills ranks of small runs with SIGKILL at random moments, resumes, and compares with a run that was never disturbed.

    python tests/kill_bench.py --kills 20

Metrics, samples and every byte of the last checkpoint (weights, moving average, optimizer, random state, cursors) have to
be the same, and no process may be left. The table is Markdown; the exit code is 1 if anything differs.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from processes import SCRIPTS, Run
from recipe import Recipe, file_checksums, make_data, read_metrics

SECONDS_TO_END = 60.0
"""For the ranks that were not killed. They learn of it by a broken connection, or by their watchdog."""
LIMIT = 300.0


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe with everything that an exact resume has to carry."""

    name: str
    recipe: Recipe
    ranks: int
    more: tuple[str, ...] = ()

    def arguments(self, run: str) -> list[str]:
        starts = self.recipe.root / "sft", self.recipe.root / "reward_model"
        common = ("run.save_every=1", "run.auto_resume=true", "watchdog.timeout_s=20", *self.more)
        if self.name == "sft":
            return self.recipe.sft(run, "sft.epochs=3", "sft.dropout=0.2", *common)
        if self.name == "reward_model":
            return self.recipe.reward_model(run, starts[0], "reward_model.epochs=2", *common)
        adaptive = ("ppo.kl_control=adaptive", "ppo.kl_target=0.01", "ppo.kl_horizon=30", "ppo.iterations=4")
        return self.recipe.ppo(run, *starts, *adaptive, *common)

    def start(self, run: str) -> Run:
        return Run.start(self.name, self.arguments(run), self.ranks, self.recipe.root / f"processes_{run}")

    def finish(self, run: str) -> float:
        """Run to the end; returns the seconds."""
        began = time.monotonic()
        started = self.start(run)
        ended = started.wait(LIMIT)
        assert started.left() == 0 and ended, f"{run} did not end in {LIMIT} s"
        assert started.codes == [0] * self.ranks, (run, started.codes, self.output(run))
        return time.monotonic() - began

    def output(self, run: str) -> str:
        folder = self.recipe.root / f"processes_{run}"
        return "\n".join((folder / f"output_{rank}").read_text()[-3000:] for rank in range(self.ranks))

    def differences(self, run: str, reference: str) -> list[str]:
        """What differs between two finished runs."""
        first, second = (self.recipe.root / name for name in (run, reference))
        found = []
        if read_metrics(first) != read_metrics(second):
            found.append("metrics")
        if self.name == "ppo" and (first / "samples.jsonl").read_bytes() != (second / "samples.jsonl").read_bytes():
            found.append("samples")
        names = [(folder / "checkpoints" / "latest").read_text() for folder in (first, second)]
        checkpoints = [folder / "checkpoints" / name for folder, name in zip((first, second), names, strict=True)]
        if names[0] != names[1] or file_checksums(checkpoints[0]) != file_checksums(checkpoints[1]):
            found.append("checkpoint")
        return found


@dataclass(frozen=True)
class Trial:
    """One kill and its outcome."""

    stage: str
    killed: str
    moment: str
    seconds_to_end: float
    left: int
    resumed_at: str
    differences: list[str]

    @property
    def passed(self) -> bool:
        return not self.differences and self.left == 0

    def row(self) -> str:
        same = "identical" if not self.differences else f"DIFFERENT: {', '.join(self.differences)}"
        cells = self.stage, self.killed, self.moment, f"{self.seconds_to_end:.1f}", self.left, self.resumed_at, same
        return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "| stage | killed | while doing | seconds until all ranks had ended | processes left | went on from | end |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def kill_once(stage: Stage, run: str, reference: str, victims: list[int], after: float) -> Trial | None:
    """Kill the victims that many seconds after the first step has begun; None if the run finished before."""
    started = stage.start(run)
    deadline = time.monotonic() + LIMIT
    while started.label(0) == "start" and started.is_running() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(after)
    if not started.is_running():
        started.wait(LIMIT)
        return None
    moment = started.label(victims[0])
    started.kill(victims)
    began = time.monotonic()
    ended = started.wait(SECONDS_TO_END)
    seconds, left = time.monotonic() - began, started.left()
    stage.finish(run)
    latest = [line for line in (stage.recipe.root / run / "log.txt").read_text().splitlines() if "resumed from" in line]
    resumed = f"step {latest[-1].rsplit(' ', 1)[1]}" if latest else "the beginning"
    killed = "all ranks" if len(victims) == stage.ranks else f"rank {', '.join(map(str, victims))}"
    differences = stage.differences(run, reference) + ([] if ended else ["ranks that hung"])
    return Trial(stage.name, killed, moment, seconds, left, resumed, differences)


def bench(recipe: Recipe, stages: list[str], kills: int, ranks: int, seed: int, more: tuple[str, ...]) -> list[Trial]:
    """The requested number of kills, spread over the stages; prints the table row by row."""
    draw = random.Random(seed)
    trials: list[Trial] = []
    print(HEADER, flush=True)
    for index, name in enumerate(stages):
        stage = Stage(name, recipe, ranks, more)
        reference = f"{name}_undisturbed"
        length = stage.finish(reference)
        wanted = kills // len(stages) + (index < kills % len(stages))
        attempt = 0
        while sum(trial.stage == name for trial in trials) < wanted:
            victims = draw.choice([[rank] for rank in range(ranks)] + [list(range(ranks))] * 2)
            attempt += 1
            trial = kill_once(stage, f"{name}_{attempt}", reference, victims, draw.uniform(0, length))
            if trial is not None:
                trials.append(trial)
                print(trial.row(), flush=True)
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all (default 20)")
    parser.add_argument("--stages", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--ranks", type=int, default=2, help="of each run (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides, for all stages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_bench_") as folder:
        recipe = make_data(Path(folder))
        Stage("sft", recipe, 1, ("run.save_every=0",)).finish("sft")
        Stage("reward_model", recipe, 1, ("run.save_every=0",)).finish("reward_model")
        trials = bench(recipe, options.stages, options.kills, options.ranks, options.seed, tuple(options.set))
    failed = [trial for trial in trials if not trial.passed]
    print(f"\n{len(trials)} kills, {len(failed)} of them with a difference or a process left")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
