"""The recipe on generated data: a few words, a small model, seconds per stage."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toys import Arrays, Block, assemble, weight_blocks

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
MODEL = [
    "model=tiny",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.vocab_size=301",  # odd: tensor parallelism pads it
    "model.max_sequence_length=64",
]
# Depend on the clock, the machine or the number of ranks.
UNREPEATABLE = ("time/", "throughput/", "memory/")


@dataclass(frozen=True)
class Recipe:
    """Data files and run folders below one folder."""

    root: Path

    @property
    def data(self) -> list[str]:
        return [f"data.tokenizer={self.root / 'tokenizer'}"]

    def sft(self, name: str, *overrides: str) -> list[str]:
        """A model from random weights: 3 steps per epoch, of demonstrations and text."""
        return [
            f"run.dir={self.root / name}",
            *MODEL,
            *self.data,
            f"data.demonstrations={self.root / 'demonstrations.jsonl'}",
            f"data.validation={self.root / 'demonstrations.jsonl'}",
            f"data.pretraining.source={self.root / 'text.txt'}",
            "data.pretraining.sequence_length=24",
            "data.pretraining_mix=0.25",
            "sft.epochs=1",
            "sft.batch_size=12",
            "sft.micro_batch_size=2",
            "policy.optimizer.lr=1e-3",
            *overrides,
        ]

    def reward_model(self, name: str, start: Path, *overrides: str) -> list[str]:
        """Four steps; one prompt has five completions in several records and is trained in parts."""
        return [
            f"run.dir={self.root / name}",
            *self.data,
            f"reward.init_from={start}",
            f"data.comparisons={self.root / 'comparisons.jsonl'}",
            "data.validation_fraction=0.2",
            "reward_model.batch_size=5",
            "reward_model.max_completions=4",
            "reward.optimizer.lr=1e-3",
            *overrides,
        ]

    def ppo(self, name: str, policy: Path, reward: Path, *overrides: str) -> list[str]:
        """Two updates per iteration, of 5 episodes and 10 sequences of text."""
        return [
            f"run.dir={self.root / name}",
            *self.data,
            f"policy.init_from={policy}",
            f"reward.init_from={reward}",
            f"data.prompts={self.root / 'prompts.jsonl'}",
            "data.max_prompt_tokens=32",
            f"data.pretraining.source={self.root / 'text.txt'}",
            "data.pretraining.sequence_length=24",
            "rollout.max_response_tokens=12",
            "rollout.batch_size=3",
            "ppo.iterations=3",
            "ppo.batch_size=10",
            "ppo.minibatch_size=5",
            "ppo.micro_batch_size=2",
            "ppo.ptx_ratio=2",
            "ppo.tax_every=2",
            "ppo.warmup_iterations=2",
            "policy.optimizer.lr=1e-4",
            *overrides,
        ]


def make_data(root: Path) -> Recipe:
    """Demonstrations ("say beta:" -> " beta beta"), rankings (fewer words are better), prompts and text."""
    from megatron_rlhf.data.tokenizer import train_tokenizer

    noise = random.Random(0)
    demonstrations = [{"prompt": f"say {word}:", "response": f" {word} {word}"} for word in WORDS for _ in range(3)][
        :27
    ]
    comparisons = []
    for index in range(20):
        word = WORDS[index % len(WORDS)]
        counts = noise.sample([1, 2, 3, 4, 5], k=2 + index % 4)
        ranks = [sorted(counts).index(count) for count in counts]
        prompt = f"{'say' if index < len(WORDS) else 'tell'} {word}:"
        comparisons.append({"prompt": prompt, "responses": [f" {word}" * n for n in counts], "ranks": ranks})
    for chosen, rejected in ((1, 3), (2, 5), (3, 4)):  # more for the first prompt, one pair per record
        texts = {"chosen": f" {WORDS[0]}" * chosen, "rejected": f" {WORDS[0]}" * rejected}
        comparisons.append({"prompt": comparisons[0]["prompt"], **texts})
    documents = [" ".join(noise.choices(WORDS, k=noise.randint(5, 30))) for _ in range(60)]
    write_lines(root / "demonstrations.jsonl", demonstrations)
    write_lines(root / "comparisons.jsonl", comparisons)
    write_lines(root / "prompts.jsonl", [{"prompt": f"say {word}:", "user": word[0]} for word in WORDS])
    (root / "text.txt").write_text("\n\n".join(documents) + "\n")
    train_tokenizer(documents, 300, root / "tokenizer")
    return Recipe(root)


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if not name.startswith(UNREPEATABLE)} for row in rows]


def file_checksums(step: Path) -> dict[str, str]:
    """Digests of a checkpoint's files; without Megatron-Core's `.metadata`, which has a random number in it."""
    lines = (step / "checksums.sha256").read_text().splitlines()
    digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    return {name: digest for name, digest in digests.items() if not name.endswith("/.metadata")}


def run_stage(stage: str, overrides: Sequence[str]) -> dict[str, list[Block]]:
    """Run one stage on this rank, as its command does; returns this rank's blocks of the trained weights."""
    from megatron_rlhf import cli

    trainer = cli.run_stage(stage, overrides)
    trained = {name: getattr(trainer, name, None) for name in ("policy", "value", "reward")}
    return {name: weight_blocks(role.role) for name, role in trained.items() if hasattr(role, "optimizer")}


def whole_weights(ranks: Sequence[dict[str, list[Block]]]) -> dict[str, Arrays]:
    """Trained weights from what `run_stage` returned on all ranks."""
    return {name: assemble([rank[name] for rank in ranks], vocab_size=301) for name in ranks[0]}
