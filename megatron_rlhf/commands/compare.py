"""One page for evaluations: reward models, policies side by side, the frontier of reward against KL, samples.

    megatron-rlhf compare --output report.html --reward-model rm=runs/eval_rm --policy sft=runs/eval_sft ppo=runs/eval_ppo \\
        --people comparisons.jsonl --rule rules.py:score --training ppo=runs/ppo

Runs are folders that megatron-rlhf evaluate wrote (--policy: answers to prompts; --reward-model: `evaluate.comparisons`), or
megatron-rlhf ppo (--training). The page is one file that opens without a network; docs/evaluation.md reads it.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlhf.commands.outputs import require_page
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.evaluation.page import write_evaluation
from megatron_rlhf.evaluation.results import Run, read_rankings
from megatron_rlhf.rewards import functions


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and returns the exit code: 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        require_page(options.output)
        policies = _runs(options.policy, "--policy")
        if options.rule is not None:
            for run in policies:
                judge_by_rule(run, options.rule)
        written = write_evaluation(
            options.output,
            options.title,
            policies,
            _runs(options.reward_model, "--reward-model"),
            _runs(options.training, "--training"),
            read_rankings(options.people) if options.people is not None else [],
            shlex.join(sys.orig_argv if arguments is None else ["megatron-rlhf", "compare", *arguments]),
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(written)
    return 0


def load_rule(spec: str) -> functions.Function:
    """The function of the user's. Raises UserError: it cannot be found, or its file cannot be imported."""
    try:
        return functions.load(spec)
    except functions.Mistake as mistake:
        raise UserError(f"--rule {spec} {mistake}") from mistake
    except (Exception, SystemExit) as error:  # the user's own code
        raise UserError(f"--rule {spec} cannot be imported: {type(error).__name__}: {error}") from error


def judge_by_rule(run: Run, spec: str) -> None:
    """Add the values of a function of the user's to the answers, as `gold`.

    Raises:
        UserError: It cannot be found, raises, or returns anything but a number for each answer.
    """
    function = load_rule(spec)
    prompts, responses = ([row[name] for row in run.answers] for name in ("prompt", "response"))
    try:
        records = [{**row, **row.get("record", {})} for row in run.answers]
        values = function(prompts, responses, records)
        names = [f"answer {i} in {run.folder}" for i in range(1, len(responses) + 1)]
        golds = functions.numbers_of(values, names)
    except functions.Mistake as mistake:
        raise UserError(f"--rule {spec} {mistake}") from mistake
    except (Exception, SystemExit) as error:  # the user's own code
        raise UserError(f"--rule {spec} raised {type(error).__name__}: {error}") from error
    for row, gold in zip(run.answers, golds, strict=True):
        row["gold"] = gold


def _runs(given: Sequence[str], option: str) -> list[Run]:
    runs: list[Run] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"{option} {text}: write NAME=RUN_DIR, such as sft=runs/eval_sft")
        if name in [run.name for run in runs]:
            raise UserError(f"{option} {text}: there are two runs of the name {name}")
        run = Run.read(name, Path(folder), is_training=option == "--training")
        needed = {"--policy": run.answers, "--reward-model": run.judged, "--training": run.metrics}[option]
        if not needed:
            what = {
                "--policy": "answers to prompts (data.prompts)",
                "--reward-model": "comparisons (evaluate.comparisons)",
            }
            raise UserError(f"{option} {text}: the run has no {what.get(option, 'metrics')}")
        runs.append(run)
    return runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".html file to write")
    parser.add_argument("--title", default="Evaluation", help="what the page is called")
    runs = "NAME=RUN_DIR"
    parser.add_argument("--policy", nargs="+", default=[], metavar=runs, help="policies, in the order to compare them")
    parser.add_argument("--reward-model", nargs="+", default=[], metavar=runs, help="reward models on comparisons")
    parser.add_argument(
        "--training", nargs="+", default=[], metavar=runs, help="PPO runs: reward against KL over updates"
    )
    parser.add_argument(
        "--people", type=Path, metavar="FILE", help="rankings of megatron-rlhf label: win rates by people"
    )
    parser.add_argument("--rule", metavar="FILE.py:NAME", help="a known reward: gold against proxy, win rates by it")
    return parser
