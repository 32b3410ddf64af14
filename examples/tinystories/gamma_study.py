"""What gamma buys: PPO-ptx against plain PPO with KL penalties, where the text is what the model was trained on.

python examples/tinystories/gamma_study.py MODEL STORIES [output folder] [name ...] [short] [key=value for PPO ...]

The text is sampled from MODEL itself, so that its gradient is noise around zero until PPO moves the model, as it is at the
paper's scale. Prompts and reward model are those of happier_stories.py. Runs that are done are kept; names (such as gamma_2,
kl_0.1, auto_1; all of them when none is given) choose which are made; the table and the picture are of all that are there.
`short` is for a look at the machinery: it learns nothing in its seconds.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import frontier
from happier_stories import HappierStories, happiness
from stories import write_documents

from megatron_rlhf.cli import exit_code_on_failure
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
from megatron_rlhf.data.tokenizer import load_tokenizer
from megatron_rlhf.models.roles import Role
from megatron_rlhf.monitoring.metrics import read_metrics
from megatron_rlhf.monitoring.report import text_table
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.collectives import on_first_rank
from megatron_rlhf.parallel.layout import ParallelLayout
from megatron_rlhf.rollout.collect import sample_responses

STREAMS, STREAM_TOKENS, TOGETHER = 1536, 510, 256
TEXT = ["data.pretraining.sequence_length=127", "data.pretraining.held_out_samples=128"]
SHORT = ["ppo.iterations=2", "ppo.warmup_iterations=1", "ppo.ptx_ratio=1", "ppo.gradient_report_every=1"]
SETTINGS = [
    "ppo.iterations=24",
    "ppo.batch_size=32",
    "ppo.minibatch_size=16",
    "ppo.ptx_ratio=8",
    "ppo.tax_every=0",
    "ppo.gradient_report_every=2",
]


@dataclass(frozen=True)
class Variant:
    """One run of PPO: its family on the picture, its place in it, and what is different about it."""

    family: str
    at: str
    overrides: tuple[str, ...]


VARIANTS = {
    "base": Variant("base", "", ()),
    "gamma_0": Variant("text", "0", ("ppo.ptx_coef=0",)),
    **{f"gamma_{g}": Variant("text", g, (f"ppo.ptx_coef={g}",)) for g in ("0.5", "2", "10", "27.8")},
    **{f"kl_{k}": Variant("KL", k, ("ppo.ptx_coef=0", f"ppo.kl_coef={k}")) for k in ("0.02", "0.1", "0.5", "2.0")},
    **{
        f"auto_{r}": Variant("auto", r, ("ppo.ptx_coef=auto", f"ppo.ptx_gradient_ratio={r}")) for r in ("0.3", "1", "3")
    },
    "gamma_2_an_eighth": Variant("less text", "2", ("ppo.ptx_coef=2", "ppo.ptx_ratio=1")),
    "gamma_27.8_longer": Variant("longer", "27.8", ("ppo.ptx_coef=27.8", "ppo.iterations=72")),
}


class GammaStudy(HappierStories):
    """Sample text, train the reward model, run PPO many times, measure each."""

    def __init__(self, model: Path, stories: Path, output: Path, overrides: Sequence[str], short: bool) -> None:
        super().__init__(model, stories, output, [])
        self.own_text = output / "own_text"
        self.settings = [*SETTINGS, *(SHORT if short else []), *overrides]
        self.streams = STREAMS
        if short:
            self.tested, self.ranked, self.streams = 16, 24, 16

    def study(self, names: Sequence[str]) -> None:
        if not (self.output / "reward_model" / "checkpoints" / "latest").exists():
            self.train_reward_model()
        self.text = self.own_text
        self.common += TEXT
        if not Path(f"{self.text}.idx").exists():
            tokenizer = load_tokenizer(self.model)
            write_documents(self.sampled_text(), tokenizer, self.text)
        for name in names:
            if not self.is_measured(name):
                if name != "base":
                    self.ppo(name, "run.auto_resume=true", *self.settings, *VARIANTS[name].overrides)
                self.answer(name)
        on_first_rank(self.write_table)

    def sampled_text(self) -> Iterator[list[int]]:
        """Streams of the model's own words from the beginning of text on, one story after the other."""
        tokenizer = load_tokenizer(self.model)
        assert tokenizer.bos_id is not None
        source = StartingPoint.find(str(self.model), "MODEL", POLICY)
        layout = ParallelLayout.create(ParallelConfig())
        layout.seed(0)  # of weights that are read the next moment
        role = Role.build("policy", source.model, layout, Precision.fp32).frozen()
        source.load_into(role)
        length = STREAM_TOKENS - 1
        sampling = SamplingConfig(max_response_tokens=length, batch_size=TOGETHER)
        for first in range(0, self.streams, TOGETHER):
            ids = range(first, min(first + TOGETHER, self.streams))
            starts = [[tokenizer.bos_id]] * len(ids)
            for stream in sample_responses(role, starts, ids, sampling, [], (0, 0)):
                yield [tokenizer.bos_id, *stream.tokens]

    def is_measured(self, name: str) -> bool:
        return (self.output / f"test_{name}" / "evaluation.jsonl").exists()

    def answer(self, name: str) -> None:
        """One continuation to each test prompt, its score, and the loss on held-out text."""
        policy = self.model if name == "base" else self.output / name
        reward = f"reward.init_from={self.output / 'reward_model'}"
        self.sample(f"test_{name}", policy, "prompts_test.jsonl", reward)

    def row(self, name: str) -> dict[str, Any]:
        """A line of the table: means with their standard errors over the test prompts, and what the run says of itself."""
        folder, variant = self.output / f"test_{name}", VARIANTS[name]
        answers = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
        lines = [] if name == "base" else read_metrics(self.output / name / "metrics.jsonl")
        reports = [line for line in lines if "policy/ptx_grad_norm" in line]
        ratios = [line["policy/ptx_grad_norm"] / line["policy/ppo_grad_norm"] for line in reports]
        coefs = [line["ptx/coef"] for line in lines if "ptx/coef" in line]
        return {
            "run": name,
            "family": variant.family,
            "at": variant.at,
            "happy minus sad words": with_error([happiness(answer["response"]) for answer in answers]),
            "reward score": with_error([answer["score"] for answer in answers]),
            "KL, nats": mean(line["kl/mean"] for line in lines[-5:]) if lines else 0.0,
            "held-out loss": read_metrics(folder / "metrics.jsonl")[-1]["tax/pretraining_loss"],
            "gamma at the end": coefs[-1] if coefs else 0.0,
            "text's gradient over PPO's": mean(ratios) if ratios else 0.0,
            "cosine": mean(line["policy/grad_cosine"] for line in reports) if reports else 0.0,
        }

    def write_table(self) -> None:
        rows = [self.row(name) for name in VARIANTS if self.is_measured(name)]
        (self.output / "gamma.json").write_text(json.dumps(rows, indent=1))
        print(f"\n{text_table(rows)}\n\npicture: {frontier.draw(rows, self.output / 'gamma.png')}")


def with_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return mean(values), stdev(values) / len(values) ** 0.5


def main(arguments: Sequence[str]) -> None:
    """Sort out what the arguments are, and study."""
    short = "short" in arguments
    names = [argument for argument in arguments if argument in VARIANTS]
    overrides = [argument for argument in arguments if "=" in argument]
    paths = [Path(argument) for argument in arguments if argument not in ("short", *names, *overrides)]
    if not 2 <= len(paths) <= 3:
        raise UserError(
            "usage: gamma_study.py MODEL STORIES [output folder] [name ...] [short] [key=value for PPO ...]"
        )
    folder = paths[2] if len(paths) > 2 else Path("runs/gamma")
    GammaStudy(paths[0], paths[1], folder, overrides, short).study(names or list(VARIANTS))


if __name__ == "__main__":
    with exit_code_on_failure():
        runtime.initialize()
        main(sys.argv[1:])
    runtime.shutdown()
