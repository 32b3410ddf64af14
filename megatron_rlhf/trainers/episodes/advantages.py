"""Advantages of a rollout by the configured estimator; all estimate the same reward, KL penalty included."""

from torch import Tensor

from megatron_rlhf.algorithms.advantages import gae, grpo, reinforce_baseline, returns_to_go, rloo
from megatron_rlhf.config.stages.ppo import PPOAlgorithmConfig
from megatron_rlhf.config.training import AdvantageEstimator
from megatron_rlhf.rollout.types import Rollout


def estimate_advantages(rewards_bt: Tensor, rollout: Rollout, config: PPOAlgorithmConfig) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [b, t]; the returns are what a value model, where there is one, learns to expect.

    rloo and grpo compare whole episodes: every token of a response has the advantage of its episode's return. grpo standardises
    scores alone: where a prompt's are equal, their KL penalties would become advantages of full size.
    """
    mask_bt, prompts_b, gamma = rollout.mask_bt, rollout.prompts_b, config.gamma
    if config.advantages is AdvantageEstimator.gae:
        return gae(rewards_bt, rollout.values_bt, mask_bt, gamma, config.lam)
    returns_bt = returns_to_go(rewards_bt, mask_bt, gamma)
    if config.advantages is AdvantageEstimator.reinforce_baseline:
        return reinforce_baseline(rewards_bt, mask_bt, prompts_b, gamma), returns_bt
    whole_b = returns_bt[:, 0]
    if config.advantages is AdvantageEstimator.rloo:
        advantages_b = rloo(whole_b, prompts_b)
    else:
        totals_b = rollout.totals(config.missing_stop_penalty)
        discounts_b = gamma ** (mask_bt.sum(dim=1) - 1)
        advantages_b = grpo(totals_b, prompts_b) + rloo(whole_b - discounts_b * totals_b, prompts_b)
    return advantages_b.unsqueeze(-1) * mask_bt, returns_bt
