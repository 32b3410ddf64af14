"""The closing table: what each model's answers are worth to the labelers, and what it still knows of its text."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from world import TRAINING_TASTE, utility

from megatron_rlhf.evaluation.statistics import win_rate
from megatron_rlhf.monitoring.metrics import read_metrics
from megatron_rlhf.monitoring.report import text_table, write_comparison


@dataclass(frozen=True)
class Answers:
    """A model's answers to the test prompts, one each, in the order of the prompts."""

    rows: list[dict[str, Any]]
    pretraining_loss: float
    kl: float | None
    """Divergence from the SFT model over the last iterations of its training, in nats per answer; None without PPO."""

    @classmethod
    def read(cls, evaluation: Path, run: Path) -> "Answers":
        rows = [json.loads(line) for line in (evaluation / "evaluation.jsonl").read_text().splitlines()]
        trained = [line["kl/mean"] for line in read_metrics(run / "metrics.jsonl") if "kl/mean" in line]
        loss = read_metrics(evaluation / "metrics.jsonl")[-1]["tax/pretraining_loss"]
        return cls(rows, loss, mean(trained[-5:]) if trained else None)

    def first_paragraphs(self) -> "Answers":
        """The part people read of a few-shot answer: up to the blank line after which the model invents the next question."""
        rows = []
        for row in self.rows:
            text, separator, _ = row["response"].partition("\n\n")
            rows.append(row | {"response": text, "stopped": row["stopped"] or bool(separator)})
        return replace(self, rows=rows)

    @property
    def gold(self) -> list[float]:
        """The labelers' utility of each answer, without their noise."""
        return [utility(row["response"], row["stopped"], TRAINING_TASTE) for row in self.rows]


def closing_table(answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """One row per model: gold score, win rate against SFT on the same prompts (ties count half), KL, loss on held-out text."""
    sft = answers["SFT"].gold
    rows = []
    for name, result in answers.items():
        rows.append(
            {
                "model": name,
                "gold score": with_error(result.gold),
                "win rate against SFT, %": "-" if name == "SFT" else win_rate(result.gold, sft),
                "KL from SFT, nats": "-" if result.kl is None else f"{result.kl:.2f}",
                "loss on held-out text": f"{result.pretraining_loss:.3f}",
            }
        )
    return rows


def with_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return mean(values), stdev(values) / math.sqrt(len(values))


def write_results(output: Path, rows: list[dict[str, Any]], accuracy: dict[str, float]) -> None:
    """results.json, report.html, and the table on the terminal."""
    (output / "results.json").write_text(json.dumps({"models": rows, "reward_model_accuracy": accuracy}, indent=1))
    agreement = ", ".join(f"{100 * value:.1f}% of the pairs of {name}" for name, value in accuracy.items())
    text = f"The reward model agrees with {agreement}."
    report = write_comparison(
        rows,
        {"PPO": output / "ppo", "PPO-ptx": output / "ppo_ptx"},
        output / "report.html",
        title="InstructGPT in miniature",
        text=text,
    )
    print(f"\n{text_table(rows)}\n\n{text}\n\nreport: {report}")
