"""What PPO collects, and the figures of an iteration that need no model."""

import statistics
from dataclasses import dataclass

import torch
from reference.sampling import Response
from torch import Tensor


@dataclass
class Episode:
    """A prompt, a response, and the models' judgements of it before any update."""

    number: int
    """Of the prompt."""
    prompt: list[int]
    response: Response
    score: float
    """The reward model's own score."""
    total: float
    """The score less the penalty."""
    logprobs: Tensor
    """[t] of each response token under the policy that wrote it."""
    kl: Tensor
    """[t] log-ratio to the reference."""
    values: Tensor
    """[t] of the state before each token."""
    returns: Tensor | None = None
    advantages: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response.tokens

    @property
    def length(self) -> int:
        return len(self.response.tokens)


def rollout_metrics(episodes: list[Episode]) -> dict[str, float]:
    scores = [episode.score for episode in episodes]
    return {
        "reward/score_mean": statistics.fmean(scores),
        "reward/score_std": statistics.pstdev(scores),
        "rollout/response_length_mean": statistics.fmean(episode.length for episode in episodes),
        "rollout/stop_fraction": statistics.fmean(episode.response.stopped for episode in episodes),
        "reward/total_mean": statistics.fmean(episode.total for episode in episodes),
        "kl/mean": statistics.fmean(float(episode.kl.sum()) for episode in episodes),
        # Schulman's k3, for tokens drawn from the policy
        "kl/k3_mean": statistics.fmean(float((torch.exp(-e.kl) - 1 + e.kl).sum()) for e in episodes),
    }


def explained_variance(episodes: list[Episode]) -> dict[str, float]:
    returns = torch.cat([episode.returns for episode in episodes])
    errors = returns - torch.cat([episode.values for episode in episodes])
    return {"value/explained_variance": float(1 - errors.var() / returns.var())}


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over an iteration's updates; the gap and what only the first has are the first's, the norm is the last's."""
    if not updates:
        return {}
    means = {name: statistics.fmean(update[name] for update in updates) for name in updates[-1]}
    firsts = {name: value for name, value in updates[0].items() if "first" in name or name not in means}
    return means | firsts | {name: value for name, value in updates[-1].items() if name.endswith("/grad_norm")}
