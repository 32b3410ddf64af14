"""How much better each token was than the value function expected."""

import torch
from torch import Tensor

from megatron_rlhf.algorithms.masking import assert_same_shape, zero_masked


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        R_t     = A_t + V_t

    t + 1 is the next real token: masked positions are skipped, wherever they are. After the last real token the
    episode is over, so V and A are 0 there. A response that was cut off for length counts as ended too.

    Args:
      rewards: [b, t] reward of the token at t.
      values: [b, t] value of the state in which the token at t is chosen.
      mask: [b, t] 1 = real token.
      gamma: discount.
      lam: 0 trusts the values (one step), 1 the rewards (the whole return).

    Returns:
      (advantages, returns), both [b, t], 0 at masked positions and without gradient.
    """
    assert_same_shape(rewards=rewards, values=values, mask=mask)
    assert mask.ndim == 2, f"rewards must be [b, t], got {tuple(mask.shape)}"
    real = mask.bool()
    rewards, values = zero_masked(rewards, real), zero_masked(values, real)

    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        # A masked position passes its input on unchanged.
        next_value = torch.where(real[:, t], values[:, t], next_value)
        next_advantage = torch.where(real[:, t], advantages[:, t], next_advantage)
    advantages = zero_masked(advantages, real)
    return advantages, advantages + values
