"""InstructGPT in miniature: pretraining, SFT, reward model, PPO and PPO-ptx in minutes, measured against the truth.

torchrun --nproc-per-node 2 examples/miniature/run.py [output folder] [key=value for the stages that have the key ...]

The stages are those of examples/train_*.py, with settings from conf/recipe/miniature; examples/quickstart.sh runs this.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from measure import Answers, closing_table, write_results
from world import HELD_OUT_TASTE, TRAINING_TASTE, Entry, corpus, demonstration, entries, rank, utility

from megatron_rlhf.cli import exit_code_on_failure, run_stage, share_out_overrides
from megatron_rlhf.data.comparisons import load_comparisons
from megatron_rlhf.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_rlhf.monitoring.files import write_lines
from megatron_rlhf.parallel import runtime
from megatron_rlhf.parallel.collectives import on_first_rank

SEED = 7
VOCABULARY = 1024


class Miniature:
    """All stages, one after the other, in one job."""

    def __init__(self, output: Path, overrides: Sequence[str]) -> None:
        self.output = output
        self.data = output / "data"
        self.overrides = share_out_overrides(overrides, ("sft", "reward_model", "ppo", "evaluate"))
        documented = entries(SEED)
        self.shown, self.asked, self.tested = documented[:700], documented[700:1200], documented[1200:1400]
        self.documented = documented

    def run(self) -> None:
        on_first_rank(self.write_data)
        self.stage("sft", "pretrain", "model=miniature", "recipe=miniature/pretrain", *self.text())
        self.stage("sft", "sft", f"policy.init_from={self.output / 'pretrain'}", *self.text(), *self.demonstrations())
        self.collect_rankings()
        reward_model = self.stage(
            "reward_model",
            "reward_model",
            f"reward.init_from={self.output / 'sft'}",
            f"data.comparisons={self.data / 'comparisons.jsonl'}",
            f"data.validation={self.data / 'comparisons_validation.jsonl'}",
        )
        accuracy = {
            labeler: reward_model.validate(self.comparisons(f"comparisons_{name}.jsonl"))["rm/validation_accuracy"]
            for labeler, name in (("training labelers", "validation"), ("held-out labeler", "held_out_labeler"))
        }
        self.stage("ppo", "ppo", *self.text(), *self.ppo(), always=["ppo.ptx_coef=0"])
        self.stage("ppo", "ppo_ptx", *self.text(), *self.ppo())
        answers = {
            "base": self.answers("pretrain"),
            "base, few-shot prompt": self.answers("pretrain", "few_shot", self.few_shot()).first_paragraphs(),
            "SFT": self.answers("sft"),
            "PPO": self.answers("ppo"),
            "PPO-ptx": self.answers("ppo_ptx"),
        }
        on_first_rank(lambda: write_results(self.output, closing_table(answers), accuracy))

    def stage(self, stage: str, name: str, *overrides: str, always: Sequence[str] = ()):
        """Run one stage in `output/name`; returns its trainer. The user's overrides win, except over `always`."""
        if dist.is_initialized() and dist.get_rank() == 0:
            print(f"\n== {name}: examples/{'evaluate' if stage == 'evaluate' else f'train_{stage}'}.py", flush=True)
        recipe = [] if any(override.startswith("recipe=") for override in overrides) else ["recipe=miniature"]
        own = [f"run.dir={self.output / name}", f"data.tokenizer={self.data / 'tokenizer'}", *overrides]
        given = self.overrides[stage]
        if name != "pretrain":  # the others take the shape of the model they start from
            given = [override for override in given if not override.startswith(("model=", "model."))]
        return run_stage(stage, [*recipe, *own, *given, *always])

    def write_data(self) -> None:
        """Corpus, tokenizer, demonstrations and prompts."""
        self.data.mkdir(parents=True, exist_ok=True)
        texts = list(corpus(self.documented[:1200]))  # the documentation of tested names is left out
        (self.data / "corpus.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
        rng = random.Random(SEED)
        shown = [(entry.prompt, demonstration(entry, rng)) for entry in self.shown for _ in range(2)]
        train_tokenizer([*texts, *(prompt + answer for prompt, answer in shown)], VOCABULARY, self.data / "tokenizer")
        records = [{"prompt": prompt, "response": answer} for prompt, answer in shown]
        write_lines(self.data / "demonstrations.jsonl", records[:1200])
        write_lines(self.data / "demonstrations_validation.jsonl", records[1200:])
        write_lines(self.data / "prompts.jsonl", [{"prompt": entry.prompt} for entry in self.asked])
        write_lines(self.data / "prompts_test.jsonl", [{"prompt": entry.prompt} for entry in self.tested])
        good = [pair for pair in shown if utility(pair[1], True, TRAINING_TASTE) >= 3][:2]
        (self.data / "few_shot.txt").write_text("".join(f"{prompt}{answer}\n\n" for prompt, answer in good))

    def collect_rankings(self) -> None:
        """K = 4..9 completions per prompt from the SFT model, ranked by the labelers."""
        rng = random.Random(SEED + 1)
        asked = [(entry, rng.randint(4, 9)) for entry in self.asked]
        repeated = [{"prompt": entry.prompt} for entry, k in asked for _ in range(k)]
        on_first_rank(lambda: write_lines(self.data / "prompts_repeated.jsonl", repeated))
        samples = [f"evaluate.samples={len(repeated)}"]
        rows = self.answers("sft", "completions", prompts="prompts_repeated.jsonl", always=samples).rows
        on_first_rank(lambda: self.write_rankings(asked, rows, rng))

    def write_rankings(self, asked: Sequence[tuple[Entry, int]], rows: list[dict], rng: random.Random) -> None:
        training: list[dict] = []
        validation: list[dict] = []
        held_out: list[dict] = []
        for index, (entry, k) in enumerate(asked):
            completions, rows = [(row["response"], row["stopped"]) for row in rows[:k]], rows[k:]
            completions = [(text, stopped) for text, stopped in completions if text.strip()]
            if len(completions) < 2:
                continue
            record = {"prompt": entry.prompt, "responses": [text for text, _ in completions]}
            ranked = record | {"ranks": rank(completions, TRAINING_TASTE, rng)}
            (validation if index % 5 == 0 else training).append(ranked)
            if index % 5 == 0:
                held_out.append(record | {"ranks": rank(completions, HELD_OUT_TASTE, rng)})
        write_lines(self.data / "comparisons.jsonl", training)
        write_lines(self.data / "comparisons_validation.jsonl", validation)
        write_lines(self.data / "comparisons_held_out_labeler.jsonl", held_out)

    def answers(
        self,
        model: str,
        name: str | None = None,
        *overrides: str,
        prompts: str = "prompts_test.jsonl",
        always: Sequence[str] = (),
    ) -> Answers:
        """Sample answers of a model; also measures its loss on held-out text."""
        folder = f"answers_{name or model}"
        source = [f"policy.init_from={self.output / model}", f"data.prompts={self.data / prompts}"]
        self.stage("evaluate", folder, *source, *self.text(), *overrides, always=always)
        return Answers.read(self.output / folder, self.output / model)

    def few_shot(self) -> str:
        return f"evaluate.few_shot={self.data / 'few_shot.txt'}"

    def comparisons(self, file: str):
        return load_comparisons(self.data / file, load_tokenizer(self.data / "tokenizer"), 64, 64, 256)

    def text(self) -> list[str]:
        return [f"data.pretraining.source={self.data / 'corpus.txt'}"]

    def demonstrations(self) -> list[str]:
        return [
            f"data.demonstrations={self.data / 'demonstrations.jsonl'}",
            f"data.validation={self.data / 'demonstrations_validation.jsonl'}",
        ]

    def ppo(self) -> list[str]:
        return [
            f"policy.init_from={self.output / 'sft'}",
            f"reward.init_from={self.output / 'reward_model'}",
            f"data.prompts={self.data / 'prompts.jsonl'}",
        ]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    folder = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else Path("runs/miniature")
    with exit_code_on_failure():
        runtime.initialize()
        Miniature(folder, arguments).run()
    runtime.shutdown()
