"""Happier stories: a real trained model, rankings by a stated rule, a reward model, PPO and PPO-ptx (after Ziegler et al. 2019).

torchrun --nproc-per-node 4 examples/tinystories/run.py MODEL STORIES [output folder] parallel.tensor=2 parallel.pipeline=2 \
    critic_parallel.tensor=2 critic_parallel.pipeline=2

MODEL is a Hugging Face folder with a tokenizer, STORIES a text file of the kind it was trained on. The rule: happy words
minus sad words of a continuation, each word counted once.
"""

import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch.distributed as dist

from megatron_rlhf.cli import exit_code_on_failure, run_stage
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.monitoring.metrics import read_metrics
from megatron_rlhf.parallel import runtime

HAPPY = set(
    "happy happily glad smile smiled smiling laugh laughed laughing love loved loves fun joy friend friends kind nice good "
    "great proud excited enjoy enjoyed hug hugged safe thank thanked thankful cheerful play played".split()
)
SAD = set(
    "sad sadly cry cried crying tears angry mad scared afraid hurt lost alone lonely bad mean broke broken upset worried "
    "sorry fell pain sick dark no".split()
)
SEED = 11
TEST_PROMPTS = 200


def happiness(text: str) -> int:
    """The rule."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return len(words & HAPPY) - len(words & SAD)


def prompts_of(stories: str, count: int) -> list[str]:
    """Openings: the first eight to fourteen words of a paragraph."""
    rng = random.Random(SEED)
    paragraphs = [p.split() for p in stories.split("\n\n") if len(p.split()) >= 20]
    rng.shuffle(paragraphs)
    return [" ".join(words[: rng.randint(8, 14)]) for words in paragraphs[:count]]


class HappierStories:
    """Rank, train a reward model, run PPO and PPO-ptx, measure."""

    def __init__(self, model: Path, stories: Path, output: Path, overrides: Sequence[str]) -> None:
        self.model, self.stories, self.output = model, stories, output
        critic = [override for override in overrides if override.startswith("critic_parallel.")]
        self.policy_only = [override for override in overrides if override not in critic]
        # The reward model is trained at the critic's layout.
        self.critic_only = [override.removeprefix("critic_") for override in critic]
        self.critic = critic
        self.tokenizer = f"data.tokenizer={model}"
        self.text = [f"data.pretraining.source={stories}", "data.pretraining.sequence_length=128", "data.pretraining.held_out=0.1"]

    def run(self) -> None:
        on_first_rank(self.write_prompts)
        self.rank_continuations()
        self.reward_model()
        for name, coefficient in (("ppo", 0), ("ppo_ptx", 1)):
            self.ppo(name, coefficient)
        rows = [self.measure(name, source) for name, source in (("before", self.model), *self.trained())]
        on_first_rank(lambda: self.write_table(rows))

    def trained(self) -> list[tuple[str, Path]]:
        return [("after PPO", self.output / "ppo"), ("after PPO-ptx", self.output / "ppo_ptx")]

    def write_prompts(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        openings = prompts_of(self.stories.read_text(encoding="utf-8"), 700)
        rng = random.Random(SEED)
        test, ranked, trained = openings[:TEST_PROMPTS], openings[TEST_PROMPTS:400], openings[400:]
        write_lines(self.output / "prompts_test.jsonl", [{"prompt": p} for p in test])
        write_lines(self.output / "prompts.jsonl", [{"prompt": p} for p in trained])
        write_lines(self.output / "prompts_ranked.jsonl", [{"prompt": p} for p in ranked for _ in range(rng.randint(4, 9))])

    def rank_continuations(self) -> None:
        """K = 4..9 continuations a prompt, ranked by the rule."""
        answers = self.sample("continuations", self.model, "prompts_ranked.jsonl", 10_000)

        def write() -> None:
            by_prompt: dict[str, list[str]] = {}
            for row in answers:
                by_prompt.setdefault(row["prompt"], []).append(row["response"])
            records = []
            for prompt, responses in by_prompt.items():
                kept = [response for response in responses if response.strip()]
                order = sorted({happiness(response) for response in kept}, reverse=True)
                ranks = [order.index(happiness(response)) for response in kept]
                if len(kept) > 1:
                    records.append({"prompt": prompt, "responses": kept, "ranks": ranks})
            write_lines(self.output / "comparisons.jsonl", records)

        on_first_rank(write)

    def reward_model(self) -> None:
        run_stage(
            "reward_model",
            [
                f"run.dir={self.output / 'reward_model'}",
                self.tokenizer,
                f"reward.init_from={self.model}",
                f"data.comparisons={self.output / 'comparisons.jsonl'}",
                "data.validation_fraction=0.2",
                "reward_model.epochs=4",
                "reward_model.batch_size=16",
                "reward_model.micro_batch_size=4",
                "reward.optimizer.lr=1e-3",
                *self.critic_only,
            ],
        )

    def ppo(self, name: str, ptx_coef: float) -> None:
        run_stage(
            "ppo",
            [
                f"run.dir={self.output / name}",
                self.tokenizer,
                *self.text,
                f"policy.init_from={self.model}",
                f"reward.init_from={self.output / 'reward_model'}",
                f"data.prompts={self.output / 'prompts.jsonl'}",
                "data.max_prompt_tokens=64",
                "rollout.max_response_tokens=64",
                "ppo.iterations=40",
                "ppo.batch_size=64",
                "ppo.minibatch_size=32",
                "ppo.micro_batch_size=16",
                "ppo.ptx_micro_batch_size=16",
                "ppo.ptx_ratio=1",
                f"ppo.ptx_coef={ptx_coef}",
                "ppo.kl_coef=0.05",
                "ppo.warmup_iterations=3",
                "ppo.tax_every=5",
                "ppo.ema_decay=0.9",
                "policy.optimizer.lr=5e-4",
                "value.optimizer.lr=1e-3",
                "run.save_every=0",
                *self.policy_only,
                *self.critic,
            ],
        )

    def sample(self, name: str, source: Path, prompts: str, count: int) -> list[dict]:
        run_stage(
            "evaluate",
            [
                f"run.dir={self.output / name}",
                self.tokenizer,
                *self.text,
                f"policy.init_from={source}",
                f"data.prompts={self.output / prompts}",
                "data.max_prompt_tokens=64",
                "sampling.max_response_tokens=64",
                "sampling.batch_size=128",
                f"evaluate.samples={count}",
                *self.policy_only,
            ],
        )
        return [json.loads(line) for line in (self.output / name / "evaluation.jsonl").read_text().splitlines()]

    def measure(self, name: str, source: Path) -> dict[str, str]:
        folder = f"test_{name.replace(' ', '_')}"
        scores = [happiness(row["response"]) for row in self.sample(folder, source, "prompts_test.jsonl", TEST_PROMPTS)]
        loss = read_metrics(self.output / folder / "metrics.jsonl")[-1]["tax/pretraining_loss"]
        kl = "-"
        if source != self.model:
            lines = read_metrics(source / "metrics.jsonl")
            kl = f"{mean(line['kl/mean'] for line in lines[-5:]):.2f}"
        return {
            "policy": name,
            "happy minus sad words": f"{mean(scores):.2f} +- {stdev(scores) / len(scores) ** 0.5:.2f}",
            "KL, nats": kl,
            "loss on held-out stories": f"{loss:.3f}",
        }

    def write_table(self, rows: list[dict[str, str]]) -> None:
        (self.output / "results.json").write_text(json.dumps(rows, indent=1))
        widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
        print("\n" + "  ".join(key.ljust(width) for key, width in widths.items()))
        for row in rows:
            print("  ".join(row[key].ljust(width) for key, width in widths.items()))


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def on_first_rank(function) -> None:
    if dist.get_rank() == 0:
        function()
    dist.barrier()


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:] if "=" not in argument]
    with exit_code_on_failure():
        if len(paths) < 2:
            raise UserError("usage: run.py MODEL STORIES [output folder] [key=value ...]")
        runtime.initialize()
        output = paths[2] if len(paths) > 2 else Path("runs/tinystories")
        HappierStories(paths[0], paths[1], output, [a for a in sys.argv[1:] if "=" in a]).run()
    runtime.shutdown()
