"""How much better a token was than expected: by a value function, or by a prompt's other samples."""

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


@torch.no_grad()
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """The discounted sum of the rewards of each token and all later ones.

        G_t = r_t + gamma G_{t+1}

    Args:
      rewards: [b, t] reward of the token at t.
      mask: [b, t] 1 = real token.
      gamma: discount.

    Returns:
      [b, t], 0 at masked positions and without gradient.
    """
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)
    return returns


@torch.no_grad()
def rloo(scores: Tensor, prompt_index: Tensor) -> Tensor:
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, eq. 6).

        A_i = s_i - 1/(n-1) sum_{j != i} s_j

    The sum is over the n samples of one prompt.

    Args:
      scores: [b] one per sample. Samples of several prompts follow one another in any order.
      prompt_index: [b] an integer that names the prompt each sample answers.

    Returns:
      [b] without gradient. A prompt with one sample is an error.
    """
    deviations, counts = _from_prompt_mean(scores, prompt_index)
    return (deviations * counts / (counts - 1)).to(scores.dtype)


@torch.no_grad()
def grpo(scores: Tensor, prompt_index: Tensor, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

        A_i = (s_i - mean) / (std + eps)

    Mean and standard deviation, the unbiased one, are of the samples of one prompt.

    Args:
      scores: [b] one per sample. Samples of several prompts follow one another in any order.
      prompt_index: [b] an integer that names the prompt each sample answers.
      eps: far below a difference of scores that means something, and far above their rounding, which would otherwise be
        standardised where all samples of a prompt score the same.

    Returns:
      [b] without gradient. A prompt with one sample is an error.
    """
    deviations, counts = _from_prompt_mean(scores, prompt_index)
    variances = _sum_by_prompt(deviations.square(), prompt_index) / (counts - 1)
    return (deviations / (variances.sqrt() + eps)).to(scores.dtype)


@torch.no_grad()
def reinforce_baseline(rewards: Tensor, mask: Tensor, prompt_index: Tensor, gamma: float = 1.0) -> Tensor:
    """REINFORCE with the prompt's mean return as baseline (Williams 1992; Hu et al. 2025, arXiv 2501.03262).

        A_t = G_t - mean of G_0

    G is `returns_to_go`, and the mean is over the samples of one prompt. In contrast to `rloo`, a token does not answer for
    rewards, such as KL penalties, of tokens before it.

    Args:
      rewards: [b, t] reward of the token at t.
      mask: [b, t] 1 = real token; the first of each row is real.
      prompt_index: [b] an integer that names the prompt of each row.
      gamma: discount.

    Returns:
      [b, t], 0 at masked positions and without gradient. A prompt with one sample is an error.
    """
    returns = returns_to_go(rewards, mask, gamma)
    whole = returns[:, 0]
    deviations, _ = _from_prompt_mean(whole, prompt_index)
    means = (whole - deviations).to(returns.dtype)
    return zero_masked(returns - means[:, None], mask)


def _from_prompt_mean(scores: Tensor, prompt_index: Tensor) -> tuple[Tensor, Tensor]:
    """(each score less the mean of its prompt's, how many the prompt has), both [b] in fp64: the mean of equal scores
    is then that score, where in fp32 `grpo` would blow the rounding of the mean up to whole advantages."""
    assert_same_shape(scores=scores, prompt_index=prompt_index)
    assert scores.ndim == 1, f"scores must be [b], got {tuple(scores.shape)}"
    precise = scores.double()
    counts = _sum_by_prompt(torch.ones_like(precise), prompt_index)
    assert bool((counts > 1).all()), "each prompt needs at least two samples to compare"
    return precise - _sum_by_prompt(precise, prompt_index) / counts, counts


def _sum_by_prompt(values: Tensor, prompt_index: Tensor) -> Tensor:
    """[b] -> [b]: the sum over the samples of the same prompt."""
    ids, prompt_b = prompt_index.unique(return_inverse=True)
    return values.new_zeros(len(ids)).index_add(0, prompt_b, values)[prompt_b]
