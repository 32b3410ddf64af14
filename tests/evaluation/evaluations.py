"""Folders as evaluations leave them, with simulated figures."""

import json
from pathlib import Path

import numpy as np


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def policy_run(folder: Path, mean: float, seed: int, samples: int = 4, prompts: int = 30) -> Path:
    """Answers whose score is in their text, for a rule to read."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(prompts):
        for score in (mean + rng.normal(size=samples)).tolist():
            rows.append(
                {
                    **{"prompt_id": i, "prompt": f"prompt {i} <b>", "stopped": True, "score": score},
                    "response": f"{0.5 * score + rng.normal():.3f} <script>document.title = 'run'</script>",
                }
            )
    write_lines(folder / "evaluation.jsonl", rows)
    figures = {
        "step": 0,
        "rollout/response_length_mean": 30.0,
        "rollout/stop_fraction": 0.9,
        "tax/pretraining_loss": 3.9,
    }
    write_lines(folder / "metrics.jsonl", [{**figures, "benchmark/hellaswag_acc": 0.4 + 0.01 * mean}])
    (folder / "config.yaml").write_text("run:\n  dir: x\n")
    (folder / "command").write_text("python examples/evaluate.py run.dir=x\n")
    return folder


def reward_run(folder: Path, prompts: int = 80) -> Path:
    rng = np.random.default_rng(7)
    rows = []
    for i in range(prompts):
        k = int(rng.integers(4, 10))
        scores, lengths = rng.normal(size=k), rng.integers(5, 100, size=k)
        noisy = scores + rng.normal(size=k)
        ranks = [int(rank) for rank in np.argsort(np.argsort(-noisy))]
        group = "training" if i % 3 else "held_out"
        rows.append(
            {"prompt": i, "ranks": ranks, "scores": scores.tolist(), "lengths": lengths.tolist(), "group": group}
        )
    write_lines(folder / "comparisons.jsonl", rows)
    return folder


def ppo_run(folder: Path, iterations: int = 60) -> Path:
    rng = np.random.default_rng(9)
    rows = [
        {
            "step": i,
            "kl/mean": 0.3 * i + rng.normal() * 0.2,
            "reward/score_mean": 3 - 3 * np.exp(-i / 20) + rng.normal() * 0.05,
        }
        for i in range(iterations)
    ]
    write_lines(folder / "metrics.jsonl", rows)
    return folder


def rule(path: Path, body: str) -> str:
    path.write_text(f"def score(prompts, responses, records):\n    {body}\n")
    return f"{path}:score"
