"""Figures of an iteration, from what it computed anyway."""

from typing import Any

from torch import Tensor

from megatron_rlhf.algorithms.masking import masked_sum
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.rollout.types import Rollout
from megatron_rlhf.trainers.step import Update

LOGGED_SAMPLES = 8


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What the rollout itself says, over all episodes."""
    responses, scores = rollout.responses, rollout.scores_b
    gap = (rollout.sampled_logprobs_bt - rollout.logprobs_bt).abs()[rollout.mask_bt]
    return {
        "reward/score_mean": float(scores.mean()),
        "reward/score_std": float(scores.std(unbiased=False)),
        "rollout/response_length_mean": float(responses.response_lengths_b.float().mean()),
        "rollout/stop_fraction": float(responses.stopped_b.float().mean()),
        "rollout/logprob_gap_max": float(gap.max()),
    }


def sample_rows(rollout: Rollout, kl_bt: Tensor, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The first few episodes as text, for samples.jsonl."""
    responses = rollout.responses
    kl = masked_sum(kl_bt, rollout.mask_bt, dim=1).tolist()
    rows = []
    for i in range(min(LOGGED_SAMPLES, len(kl))):
        start = int(responses.prompt_lengths_b[i])
        tokens = responses.tokens_bs[i, : int(responses.last_b[i]) + 1].tolist()
        rows.append(
            {
                "prompt": tokenizer.decode(tokens[:start]),
                "response": tokenizer.decode(tokens[start:], continuation=True),
                "score": float(rollout.scores_b[i]),
                "kl": kl[i],
            }
        )
    return rows


def mean_of(updates: list[Update], name: str) -> float:
    """Mean over the updates of an iteration; each is already a global mean of its minibatch."""
    return sum(update.statistics[name] for update in updates) / len(updates)


def iteration_flops(
    policy_parameters: int, critic_parameters: int, episode_tokens: int, policy_tokens: int, critic_tokens: int
) -> float:
    """Model FLOPs of an iteration: 2 N a token forward, 6 N with backward (Kaplan et al. 2020), attention's share left out.

    Args:
        episode_tokens: sampled and scored: the policy reads them twice, reference, reward and value model once each.
        policy_tokens, critic_tokens: trained on; for the policy with the pretraining text.
    """
    forward = 2 * episode_tokens * (3 * policy_parameters + 2 * critic_parameters)
    return float(forward + 6 * (policy_tokens * policy_parameters + critic_tokens * critic_parameters))
