"""From one score per response to one reward per token."""

from torch import Tensor

from megatron_rlhf.algorithms.masking import assert_same_shape, zero_masked


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Puts the score on the last real token and a KL penalty on every real token.

        r_t = [t is the last real token] score - kl_coef kl_t

    Summed over a response this is the reward of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, eq. 2).

    Args:
      scores: [b] the reward model's score of each response.
      kl: [b, t] as `token_kl` estimates it.
      mask: [b, t] 1 = real token.
      kl_coef: price of a nat (beta in the paper).

    Returns:
      [b, t]; 0 at masked positions. A row without a real token gets no score.
    """
    assert_same_shape(kl=kl, mask=mask)
    assert scores.shape == mask.shape[:1], f"scores must be [{len(mask)}], got {tuple(scores.shape)}"
    real = mask.bool()
    real_from_here = real.flip(1).cumsum(1).flip(1)
    is_last = real & (real_from_here == 1)
    return zero_masked(scores[:, None].expand_as(kl), is_last) - kl_coef * zero_masked(kl, real)
