"""Held-out prompts: how good the policy is on what it was not trained on, and whether it still improves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.config.stages.held_out import HeldOutConfig
from megatron_rlhf.data.prompts import Prompt
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.rewards.reward import several
from megatron_rlhf.rollout.collect import Roles, sample_and_judge
from megatron_rlhf.rollout.judging import Judge
from megatron_rlhf.trainers.episodes.metrics import LOGGED_SAMPLES
from megatron_rlhf.trainers.episodes.texts import texts_of


@dataclass
class Progress:
    """What a run has reached; in its checkpoints."""

    best: float | None = None
    """Highest score of an evaluation."""
    since_best: int = 0
    """Evaluations after it."""
    kl: float = 0.0
    """Of the last iteration, in nats a response."""

    def add(self, score: float) -> float:
        """The score of a new evaluation, which it returns."""
        better = math.isfinite(score) and (self.best is None or score > self.best)
        self.best, self.since_best = (score, 0) if better else (self.best, self.since_best + 1)
        return score

    def reason_to_stop(self, config: HeldOutConfig) -> str | None:
        """Why the run should end now, for the log."""
        if config.max_kl is not None and self.kl > config.max_kl:
            return f"KL of {self.kl:.4g} nats a response is above evaluation.max_kl={config.max_kl:g}"
        if config.patience is not None and self.since_best >= config.patience:
            best = "had a finite score" if self.best is None else f"was better than {self.best:.4g}"
            return f"no evaluation of the last {self.since_best} {best} (evaluation.patience)"
        return None


def evaluate(
    config: PPOConfig, roles: Roles, prompts: Sequence[Prompt], tokenizer: Tokenizer, refresh: Callable[[], None]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of the policy's responses, and the first of them as rows of samples.jsonl. Collective over the world.

    Random numbers depend on the seed and the prompt alone: evaluations differ by the policy.
    """
    refresh()
    texts = [prompt.tokens.tolist() for prompt in prompts]
    ids, sampling = (
        [prompt.id for prompt in prompts],
        replace(config.rollout, temperature=config.evaluation.temperature),
    )
    seed = (config.run.seed, 0)
    judge = Judge(
        roles.reward,
        None,
        texts,
        tokenizer.pad_id,
        config.ppo.micro_batch,
        lambda responses: texts_of(prompts, responses, tokenizer),
    )
    completions, responses = sample_and_judge(
        roles, judge, ids, sampling, tokenizer.stop_ids, seed, tokenizer.stop_watch
    )
    scores = roles.reward.scores(judge.scores())
    parts = several(scores.parts)
    timeouts = {} if scores.timeouts is None else {"evaluation/timeouts": float(scores.timeouts)}
    metrics = {
        "evaluation/score_mean": float(scores.total_b.mean()),
        **{f"evaluation/{name}_mean": float(part_b.mean()) for name, part_b in parts.items()},
        **timeouts,
        "evaluation/response_length_mean": float(responses.response_lengths_b.float().mean()),
        "evaluation/stop_fraction": float(responses.stopped_b.float().mean()),
    }
    rows = [
        {
            "held_out": True,
            "prompt": prompt.text,
            "response": tokenizer.decode(completions[i].tokens, continuation=True),
            "score": float(scores.total_b[i]),
            **{name: float(part_b[i]) for name, part_b in parts.items()},
        }
        for i, prompt in enumerate(prompts[:LOGGED_SAMPLES])
    ]
    return metrics, rows
