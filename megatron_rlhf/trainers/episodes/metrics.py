"""Metrics of an iteration, from what it computed anyway."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_rlhf.algorithms.kl import token_kl
from megatron_rlhf.algorithms.losses import explained_variance
from megatron_rlhf.algorithms.masking import masked_sum
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.roles import Role
from megatron_rlhf.rewards.reward import several
from megatron_rlhf.rollout.collect import Roles
from megatron_rlhf.rollout.types import Rollout
from megatron_rlhf.trainers.step import TrainedRole, Update

LOGGED_SAMPLES = 8


def rollout_metrics(rollout: Rollout, totals_b: Tensor) -> dict[str, float]:
    """Metrics of the rollout itself, over all episodes; `totals_b` are the scores after penalties."""
    responses, scores = rollout.responses, rollout.scores_b

    def kl_of_sequences(estimator: str) -> float:
        kl_bt = token_kl(rollout.logprobs_bt, rollout.ref_logprobs_bt, estimator)
        return float(masked_sum(kl_bt, rollout.mask_bt, dim=1).mean())

    gap = {}
    if (recomputed_bt := rollout.recomputed_logprobs_bt) is not None:
        gaps = (rollout.sampled_logprobs_bt - recomputed_bt).abs()[rollout.mask_bt]
        gap = {"rollout/logprob_gap_max": float(gaps.max())}
    return {
        "reward/score_mean": float(scores.mean()),
        "reward/score_std": float(scores.std(unbiased=False)),
        "reward/total_mean": float(totals_b.mean()),
        **{f"reward/{name}_mean": float(part_b.mean()) for name, part_b in several(rollout.parts).items()},
        **({} if rollout.timeouts is None else {"reward/timeouts": float(rollout.timeouts)}),
        "kl/mean": kl_of_sequences("k1"),
        "kl/k3_mean": kl_of_sequences("k3"),
        "rollout/response_length_mean": float(responses.response_lengths_b.float().mean()),
        "rollout/stop_fraction": float(responses.stopped_b.float().mean()),
        **gap,
    }


def sample_rows(rollout: Rollout, totals_b: Tensor, kl_bt: Tensor, tokenizer: Tokenizer) -> list[dict[str, Any]]:
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
                **{name: float(part_b[i]) for name, part_b in several(rollout.parts).items()},
                "total": float(totals_b[i]),
                "kl": kl[i],
            }
        )
    return rows


def policy_metrics(updates: Sequence[Update], lr: float, with_pretraining: bool) -> dict[str, float]:
    """Metrics of an iteration's policy updates; during a warmup of the critic there are none."""
    if not updates:
        return {"policy/lr": 0.0}
    names = ["policy/loss", "policy/ratio_mean", "policy/clip_fraction", "policy/approx_kl", "policy/entropy"]
    return {
        **{name: mean_of(updates, name) for name in names + ["ptx/loss"] * with_pretraining},
        "policy/first_ratio_max_gap": updates[0].statistics["policy/ratio_max_gap"],
        "policy/grad_norm": updates[-1].grad_norm,
        **gradient_metrics(updates),
        "policy/lr": lr,
    }


def gradient_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Of the iteration's update, if any, that separated the text's gradient, gamma included, from PPO's."""
    for update in updates:
        if (found := update.gradients) is not None:
            return {
                "policy/ppo_grad_norm": found.rest_norm,
                "policy/ptx_grad_norm": found.first_norm,
                "policy/grad_cosine": found.cosine,
            }
    return {}


def value_metrics(rollout: Rollout, returns_bt: Tensor, updates: Sequence[Update]) -> dict[str, float]:
    """Metrics of an iteration's value updates, if there is a value model, and how well the old values predicted the returns."""
    if not updates:
        return {}
    return {
        **{name: mean_of(updates, name) for name in ("value/loss", "value/clip_fraction")},
        "value/explained_variance": float(explained_variance(rollout.values_bt, returns_bt, rollout.mask_bt)),
        "value/grad_norm": updates[-1].grad_norm,
    }


def mean_of(updates: Sequence[Update], name: str) -> float:
    """Mean over the updates of an iteration; each is already a global mean of its minibatch."""
    return sum(update.statistics[name] for update in updates) / len(updates)


def cost_of_iteration(
    config: PPOConfig, policy: Role, value: TrainedRole | None, roles: Roles, rollout: Rollout, updates: int
) -> dict[str, float]:
    """`iteration_cost` of a rollout and this many updates of the policy on it, whatever rank holds which role. `roles`: those
    that score it."""
    sequences = updates * config.ppo.ptx_ratio * config.ppo.minibatch_size * config.ppo.mixes_text
    return iteration_cost(
        policy=policy.num_parameters,
        value=value.role.num_parameters if value is not None else 0,
        judges=sum(role.num_parameters for role in roles.reward.models.values()),
        episode_tokens=int((rollout.responses.last_b + 1).sum()),
        policy_reads=1 + (rollout.recomputed_logprobs_bt is not None),
        value_reads=int(roles.value is not None),
        policy_epochs=config.ppo.inner_epochs * bool(updates),
        value_epochs=config.ppo.inner_epochs,
        text_tokens=sequences * config.data.pretraining.sequence_length,
    )


def iteration_cost(
    policy: int,
    value: int,
    judges: int,
    episode_tokens: int,
    policy_reads: int,
    value_reads: int,
    policy_epochs: int,
    value_epochs: int,
    text_tokens: int,
) -> dict[str, float]:
    """Tokens that the policy trains on, and model FLOPs: 2 N per token forward, 6 N with backward (Kaplan et al. 2020).

    Attention's share is left out.

    Args:
        policy, value: parameters of the two models that learn; 0 without a value model.
        judges: of the reward models together.
        episode_tokens: sampled and scored: reference and reward models read them once each.
        policy_reads: how often the policy does, when it samples and where it scores them.
        value_reads: how often the value model does before its updates.
        policy_epochs, value_epochs: how often each is trained on them.
        text_tokens: the policy also trains on these.
    """
    policy_tokens = episode_tokens * policy_epochs + text_tokens
    forward = 2 * episode_tokens * ((policy_reads + 1) * policy + judges + value_reads * value)
    backward = 6 * (policy_tokens * policy + episode_tokens * value_epochs * value)
    return {"step_tokens": float(policy_tokens), "step_flops": float(forward + backward)}
