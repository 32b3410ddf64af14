"""Steps 2 and 3 of InstructGPT again and again.

The current policy answers, its answers are ranked, the reward model is trained on all rankings so far, PPO goes on from the
policy.

    torchrun --nproc-per-node 2 -m megatron_rlhf iterate runs/loop --rounds 2 --policy runs/sft --prompts prompts.jsonl \\
        --rule rules.py:score --comparisons first.jsonl ppo.iterations=50 sampling.max_response_tokens=64
    megatron-rlhf iterate runs/loop --policy runs/sft --prompts prompts.jsonl --people ann --people bob

With --people the answers go into a labeling project, and the command ends and says how to label; called again, it goes on
when every prompt has its rankings. In any case the same command goes on where it was stopped, between stages or inside
one. Overrides KEY=VALUE go to the stages that have the key. At the end, a page compares the policies of all rounds.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rlhf.cli import exit_code_on_failure, run_stage, share_out_overrides
from megatron_rlhf.commands.compare import judge_by_rule, load_rule
from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import RewardModelConfig
from megatron_rlhf.data.files.text_files import iterate_text_file
from megatron_rlhf.evaluation.page import write_evaluation
from megatron_rlhf.evaluation.results import Run
from megatron_rlhf.labeling import collecting
from megatron_rlhf.labeling.answers import dense
from megatron_rlhf.labeling.export import exported
from megatron_rlhf.labeling.project import Project
from megatron_rlhf.labeling.types import TRAINING, Settings
from megatron_rlhf.monitoring.files import replacing, write_lines

STAGES = ("evaluate", "reward_model", "ppo")
log = logging.getLogger(__name__)


class Waiting(Exception):
    """People have to label before the loop goes on; the message says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loop as one job; the exit code is 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = _parser().parse_known_args(arguments)
    with exit_code_on_failure():
        unknown = [override for override in overrides if "=" not in override or override.startswith("-")]
        if unknown:
            raise UserError(f"{unknown[0]}: neither an option (--help lists them) nor KEY=VALUE of a stage")
        if (options.rule is None) == (options.people is None):
            raise UserError("who ranks the answers? give --rule FILE.py:NAME or --people NAME")
        from megatron_rlhf.parallel import runtime

        runtime.initialize()
        try:
            Loop(options, overrides).run()
        except Waiting as reason:
            text = str(reason)
            _on_first_rank(lambda: print(text))
        runtime.shutdown()
    return 0


class Loop:
    """All rounds; what is finished is in `state.json` of the output folder."""

    def __init__(self, options: argparse.Namespace, overrides: Sequence[str]) -> None:
        self.options, self.output = options, Path(options.output)
        self.overrides = share_out_overrides(overrides, STAGES)
        about_data = [override for override in self.overrides["reward_model"] if override.startswith("data")]
        self.data = compose_config("reward_model", RewardModelConfig, about_data, missing="-")[0].data
        self._check()
        self.state = self.output / "state.json"
        self.setup = {
            "policy": options.policy,
            "prompts": options.prompts,
            "samples": options.samples,
            "judge": options.rule or "people",
        }
        begun: dict[str, Any] = {"setup": self.setup, "done": []}
        found = self._read_state() if self.state.exists() else begun
        changed = [name for name, value in self.setup.items() if found["setup"][name] != value]
        if changed:
            raise UserError(
                f"{self.output} was begun with {changed[0]} = {found['setup'][changed[0]]}, and now it is "
                f"{self.setup[changed[0]]}: go on with the same, or name another folder"
            )
        self.done: list[str] = found["done"]

    def _check(self) -> None:
        """What is used only after hours, and what must not be in the way."""
        # They take torch, for which --help need not wait.
        from megatron_rlhf.data.records import read_records
        from megatron_rlhf.runs.stage import RUNS, stage_of

        given = {"rounds": 1, "samples": 2, "labels_per_prompt": 1}
        for name, least in given.items():
            if (value := getattr(self.options, name)) < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least {least}")
        if (stage := stage_of(self.output)) is not None:
            raise UserError(f"{self.output} holds {RUNS[stage]}: name a folder of its own for the loop")
        next(read_records(self.options.prompts), None)
        self._given_comparisons()
        if self.options.rule is not None:
            load_rule(self.options.rule)

    def _given_comparisons(self) -> list[dict[str, Any]]:
        """Those that there are already, in our own columns: of a published format, without what nothing can be learned from."""
        from megatron_rlhf.data.formats.ranked import known_flaw, read_ranked
        from megatron_rlhf.data.formats.shape import Shape
        from megatron_rlhf.data.records import read_records

        if self.options.comparisons is None:
            return []
        shape = Shape.of(self.data.format, self.data.columns.given(), self.data.chat)
        rows, flawed = [], 0
        for record in read_records(self.options.comparisons, shape, kind="comparisons"):
            if (record.lenient and known_flaw(record)) or (read_ranked(record).has_empty and record.lenient):
                flawed += 1
            else:
                rows.append(dict(record.fields))
        if flawed:
            log.info("%s: %d records without an answer are left out", self.options.comparisons, flawed)
        return rows

    def _read_state(self) -> dict[str, Any]:
        try:
            found = json.loads(self.state.read_text())
            if set(found["setup"]) == set(self.setup) and isinstance(found["done"], list):
                return dict(found)
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
        raise UserError(f"{self.state} is not the state of a loop: name another folder, or delete this one")

    def run(self) -> None:
        policy = Path(self.options.policy)
        for number in range(1, self.options.rounds + 1):
            folder = self.output / f"round_{number}"
            self.once(f"{number} answers", partial(self.answer, policy, folder))
            self.once(f"{number} rankings", partial(self.rank, folder, number))
            self.once(f"{number} reward model", partial(self.train_reward_model, folder))
            self.once(f"{number} ppo", partial(self.train_policy, policy, folder))
            policy = folder / "ppo"
        last = self.output / f"round_{self.options.rounds + 1}"
        self.once(f"{self.options.rounds + 1} answers", partial(self.answer, policy, last))
        _on_first_rank(self.report)

    def once(self, name: str, step: Callable[[], None]) -> None:
        """A step that a stopped loop does not repeat once it is finished."""
        if name in self.done:
            return
        step()
        self.done.append(name)
        _on_first_rank(self._write_state)

    def _write_state(self) -> None:
        with replacing(self.state) as file:
            file.write(json.dumps({"setup": self.setup, "done": self.done}, indent=1).encode())

    def answer(self, policy: Path, folder: Path) -> None:
        """Sampled answers of the current policy."""
        labels = [f"evaluate.labels={folder / 'labels.sqlite'}"] if self.options.people else []
        if self.options.people:
            _on_first_rank(lambda: self._make_project(folder / "labels.sqlite"))
        self.stage(
            "evaluate",
            folder / "answers",
            f"policy.init_from={policy}",
            f"data.prompts={self.options.prompts}",
            f"evaluate.samples_per_prompt={self.options.samples}",
            *labels,
        )

    def _make_project(self, path: Path) -> None:
        labels = min(self.options.labels_per_prompt, len(self.options.people))
        project = Project.open(path) if path.exists() else Project.create(path, Settings(labels_per_prompt=labels))
        project.add_labelers(self.options.people, TRAINING)
        project.close()
        collecting.check(path)

    def rank(self, folder: Path, number: int) -> None:
        """All comparisons so far: those that were given, those of earlier rounds, and those of this round's answers."""
        before = self.output / f"round_{number - 1}" / "comparisons.jsonl"
        earlier = [row for _, row in iterate_text_file(before)] if number > 1 else self._given_comparisons()
        new = self._by_people(folder) if self.options.people else self._by_rule(folder)
        if not new:
            raise UserError(
                f"{folder}: no prompt has answers of which one is better; sample more, or at a higher temperature"
            )
        _on_first_rank(lambda: write_lines(folder / "comparisons.jsonl", [*earlier, *new]))

    def _by_rule(self, folder: Path) -> list[dict[str, Any]]:
        run = Run.read("answers", folder / "answers")
        judge_by_rule(run, self.options.rule)
        answers: dict[str, dict[str, float]] = {}
        given: dict[str, dict[str, Any]] = {}
        for row in run.answers:
            if row["response"].strip():
                answers.setdefault(row["prompt"], {})[row["response"]] = row["gold"]
                given[row["prompt"]] = row.get("given") or {"prompt": row["prompt"]}
        return [
            {**given[prompt], "responses": list(golds), "ranks": dense([-gold for gold in golds.values()])}
            for prompt, golds in answers.items()
            if len(set(golds.values())) > 1
        ]

    def _by_people(self, folder: Path) -> list[dict[str, Any]]:
        path = folder / "labels.sqlite"
        project = Project.open(path)
        left = {name: project.left(name) for name in project.labelers()}
        rows = list(exported(project, [TRAINING]))
        project.close()
        if any(left.values()):
            waiting = ", ".join(f"{name}: {count}" for name, count in left.items())
            raise Waiting(
                f"rankings are needed ({waiting} prompts left): megatron-rlhf label serve {path}; then this command again"
            )
        return [row for row in rows if len(set(row["ranks"])) > 1]

    def train_reward_model(self, folder: Path) -> None:
        """From the first policy, on all comparisons."""
        start = self.options.reward_start or self.options.policy
        ours = ["data.format=null", *(f"data.columns.{name}=null" for name in self.data.columns.given() or ())]
        self.stage(
            "reward_model",
            folder / "reward_model",
            f"reward.init_from={start}",
            f"data.comparisons={folder / 'comparisons.jsonl'}",
            *ours,
            "run.auto_resume=true",
        )

    def train_policy(self, policy: Path, folder: Path) -> None:
        """PPO goes on from the policy whose answers were ranked, which is its reference too."""
        starts = [f"policy.init_from={policy}", f"reward.init_from={folder / 'reward_model'}"]
        self.stage("ppo", folder / "ppo", *starts, f"data.prompts={self.options.prompts}", "run.auto_resume=true")

    def stage(self, stage: str, folder: Path, *settings: str) -> None:
        """The user's overrides win, except over what makes the loop."""
        run_stage(stage, [*self.overrides[stage], f"run.dir={folder}", *settings])

    def report(self) -> None:
        """The policies of all rounds, side by side, on the prompts of the loop."""
        rounds = range(1, self.options.rounds + 2)
        policies = [Run.read(f"after {n - 1} rounds", self.output / f"round_{n}" / "answers") for n in rounds]
        if self.options.rule:
            for run in policies:
                judge_by_rule(run, self.options.rule)
        training = [Run.read(f"round {n}", self.output / f"round_{n}" / "ppo", is_training=True) for n in rounds[:-1]]
        page = write_evaluation(
            self.output / "report.html",
            f"{self.output.name}: {self.options.rounds} rounds",
            policies,
            training=training,
        )
        print(f"report: {page}")


def _on_first_rank(function: Callable[[], Any]) -> None:
    from megatron_rlhf.parallel.collectives import on_first_rank

    on_first_rank(function)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="folder of the loop; the same command goes on in it")
    parser.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="default 2; a larger number later adds rounds"
    )
    parser.add_argument("--policy", required=True, metavar="START", help="the first policy, such as an SFT run")
    parser.add_argument(
        "--reward-start", metavar="START", help="what reward models start from; default the first policy"
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="prompts to answer, and of PPO")
    parser.add_argument("--comparisons", metavar="FILE", help="comparisons that there are already, .jsonl")
    parser.add_argument(
        "--samples", type=int, default=4, metavar="K", help="answers to rank for each prompt; default 4"
    )
    parser.add_argument("--rule", metavar="FILE.py:NAME", help="ranks by a reward function")
    parser.add_argument("--people", action="append", metavar="NAME", help="who ranks, on the labeling page; repeatable")
    parser.add_argument(
        "--labels-per-prompt", type=int, default=1, metavar="N", help="labelers of each prompt; default 1"
    )
    return parser
