"""Happier stories (after Ziegler et al. 2019): a real trained model, rankings by a stated rule, PPO and PPO-ptx.

torchrun --nproc-per-node 4 examples/tinystories/happier_stories.py MODEL STORIES [output folder] \
    parallel.tensor=2 parallel.pipeline=2 critic_parallel.tensor=2 critic_parallel.pipeline=2

MODEL is a Hugging Face folder with its tokenizer, STORIES a text of the kind it was trained on. The rule: happy words minus
sad words of a continuation, each word counted once. Settings are in conf/recipe/tinystories.
"""

import json
import random
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

from stories import write_stories

from megatron_rlhf.cli import exit_code_on_failure, run_stage, share_out_overrides
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.tokenizer import load_tokenizer
from megatron_rlhf.monitoring.files import write_lines
from megatron_rlhf.monitoring.metrics import read_metrics
from megatron_rlhf.monitoring.report import text_table, write_comparison
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.collectives import on_first_rank

HAPPY = set(
    """happy happily glad smile smiled smiling laugh laughed laughing love loved loves fun joy friend friends kind nice
    good great proud excited enjoy enjoyed hug hugged safe thank thanked thankful cheerful play played""".split()
)
SAD = set(
    """sad sadly cry cried crying tears angry mad scared afraid hurt lost alone lonely bad mean broke broken upset
    worried sorry fell pain sick dark no""".split()
)
SEED = 11
CONTEXT = 512


def happiness(text: str) -> int:
    """The rule."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return len(words & HAPPY) - len(words & SAD)


def openings(stories: str, rng: random.Random) -> list[str]:
    """The first eight to fourteen words of each paragraph, shuffled."""
    paragraphs = [words for words in map(str.split, stories.split("\n\n")) if len(words) >= 20]
    rng.shuffle(paragraphs)
    return [" ".join(words[: rng.randint(8, 14)]) for words in paragraphs]


class HappierStories:
    """Rank continuations, train a reward model, run PPO and PPO-ptx, measure."""

    tested, ranked = 200, 400
    """Prompts to measure with, and prompts whose continuations are ranked; the others are PPO's."""

    def __init__(self, model: Path, stories: Path, output: Path, overrides: Sequence[str]) -> None:
        self.model, self.stories, self.output = model, stories, output
        self.text = output / "stories"
        self.overrides = share_out_overrides(overrides, ("reward_model", "ppo", "evaluate"))
        self.common = ["recipe=tinystories", f"data.tokenizer={model}"]

    def run(self) -> None:
        self.train_reward_model()
        self.ppo("ppo", "ppo.ptx_coef=0")
        self.ppo("ppo_ptx")
        policies = {"before": self.model, "after PPO": self.output / "ppo", "after PPO-ptx": self.output / "ppo_ptx"}
        rows = [self.measure(name, path) for name, path in policies.items()]
        on_first_rank(lambda: self.write_results(rows))

    def train_reward_model(self) -> None:
        on_first_rank(self.write_data)
        continuations = self.sample("continuations", self.model, "prompts_ranked.jsonl", "evaluate.samples=10000")
        on_first_rank(lambda: self.write_rankings(continuations))
        # The reward model is trained in the layout that PPO will give it.
        critic = [override for override in self.overrides["ppo"] if override.startswith("critic_parallel.")]
        reward_layout = [override.removeprefix("critic_") for override in critic]
        other = [override for override in self.overrides["reward_model"] if not override.startswith("parallel.")]
        ranked = [f"reward.init_from={self.model}", f"data.comparisons={self.output / 'comparisons.jsonl'}"]
        run_stage(
            "reward_model", [*other, *self.common, *reward_layout, f"run.dir={self.output / 'reward_model'}", *ranked]
        )

    def write_data(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        text = self.stories.read_text(encoding="utf-8")
        tokenizer = load_tokenizer(self.model)
        write_stories(text, tokenizer, CONTEXT, self.text)
        rng = random.Random(SEED)
        found = openings(text, rng)
        last = self.tested + self.ranked
        parts = {"test": found[: self.tested], "ranked": found[self.tested : last], "trained": found[last:]}
        parts["ranked"] = [prompt for prompt in parts["ranked"] for _ in range(rng.randint(4, 9))]
        begin = tokenizer.hf.bos_token  # like every text that the model was trained on
        for name, prompts in parts.items():
            write_lines(self.output / f"prompts_{name}.jsonl", [{"prompt": begin + prompt} for prompt in prompts])

    def write_rankings(self, continuations: list[dict]) -> None:
        """K = 4..9 continuations per prompt, ranked by the rule; equal counts tie."""
        comparisons = []
        for prompt, rows in groupby(continuations, key=lambda row: row["prompt"]):
            responses = [row["response"] for row in rows if row["response"].strip()]
            order = sorted({happiness(response) for response in responses}, reverse=True)
            ranks = [order.index(happiness(response)) for response in responses]
            if len(responses) > 1:
                comparisons.append({"prompt": prompt, "responses": responses, "ranks": ranks})
        write_lines(self.output / "comparisons.jsonl", comparisons)

    def ppo(self, name: str, *overrides: str) -> None:
        sources = [f"policy.init_from={self.model}", f"reward.init_from={self.output / 'reward_model'}"]
        data = [f"data.prompts={self.output / 'prompts_trained.jsonl'}", f"data.pretraining.source={self.text}"]
        folder = f"run.dir={self.output / name}"
        run_stage("ppo", [*self.overrides["ppo"], *self.common, folder, *sources, *data, *overrides])

    def sample(self, name: str, policy: Path, prompts: str, *overrides: str) -> list[dict]:
        """One continuation per prompt; the loss on held-out stories is in the run's metrics."""
        data = [f"data.prompts={self.output / prompts}", f"data.pretraining.source={self.text}"]
        folder = self.output / name
        common = [*self.overrides["evaluate"], *self.common, f"run.dir={folder}"]
        run_stage("evaluate", [*common, f"policy.init_from={policy}", *data, *overrides])
        return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]

    def measure(self, name: str, policy: Path) -> dict[str, object]:
        folder = f"test_{name.replace(' ', '_')}"
        scores = [happiness(row["response"]) for row in self.sample(folder, policy, "prompts_test.jsonl")]
        iterations = [] if policy == self.model else read_metrics(policy / "metrics.jsonl")
        return {
            "policy": name,
            "happy minus sad words": (mean(scores), stdev(scores) / len(scores) ** 0.5),
            "KL, nats a continuation": mean(line["kl/mean"] for line in iterations[-5:]) if iterations else 0.0,
            "loss on held-out stories": read_metrics(self.output / folder / "metrics.jsonl")[-1][
                "tax/pretraining_loss"
            ],
        }

    def write_results(self, rows: list[dict[str, object]]) -> None:
        (self.output / "results.json").write_text(json.dumps(rows, indent=1))
        runs = {"PPO": self.output / "ppo", "PPO-ptx": self.output / "ppo_ptx"}
        report = write_comparison(rows, runs, self.output / "report.html", title="Happier stories")
        print(f"\n{text_table(rows)}\n\nreport: {report}")


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:] if "=" not in argument]
    with exit_code_on_failure():
        if len(paths) < 2:
            raise UserError("usage: happier_stories.py MODEL STORIES [output folder] [key=value ...]")
        runtime.initialize()
        destination = paths[2] if len(paths) > 2 else Path("runs/tinystories")
        HappierStories(paths[0], paths[1], destination, [a for a in sys.argv[1:] if "=" in a]).run()
    runtime.shutdown()
