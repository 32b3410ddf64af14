"""The losses of the three stages. Each returns (loss, statistics): a scalar, and detached scalar tensors by name.

Normalisation. A number should be a mean over the whole batch, but a rank sees one microbatch at a time, and a mean of
means is wrong as soon as lengths differ. So every loss takes a `normalizer`:

- None: the loss and the statistics are means over the given tensors.
- a number, the count over all microbatches and ranks: they are sums divided by that number, so that adding them up over
  microbatches and ranks gives the mean over the whole batch. What counts is real tokens, and for `ranking_loss` prompts
  (`count_ranked_prompts`). The normalizer must not be 0.

To combine the statistics of several microbatches, take the maximum of those ending in `_max_gap` and add up all
others, counts included. Only `accuracy` is always the microbatch's own; the whole batch's is correct_pairs / pairs.

Masked positions have no influence (see masking.py). With nothing to average over, a loss is 0 with gradient 0.

Shapes: b = batch, t = response position, n = completion, q = strict pair of completions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rlhf.algorithms.kl import token_kl
from megatron_rlhf.algorithms.masking import assert_same_shape, masked_mean, masked_sum, masked_var, zero_masked

Statistics = dict[str, Tensor]


def _mean(values: Tensor, mask: Tensor, normalizer: float | Tensor | None) -> Tensor:
    return masked_mean(values, mask) if normalizer is None else masked_sum(values, mask) / normalizer


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

        ratio = pi / pi_old
        loss  = mean of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))

    Args:
      logprobs: [b, t] current log-probability of the sampled token. The only input that gets a gradient.
      old_logprobs: [b, t] the same when it was sampled.
      advantages: [b, t]
      mask: [b, t] 1 = real token.
      clip: how far the ratio may move before its gradient stops (0.2).
      normalizer: see the module's docstring.

    Returns:
      loss, and: ratio_mean; ratio_max_gap, the largest |ratio - 1|, which is 0 on the first update after a rollout;
      clip_fraction, the fraction of tokens that have no gradient because of the clip; approx_kl, KL(pi_old || pi) by k3.
    """
    assert_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    logprobs = zero_masked(logprobs, mask)
    old_logprobs = zero_masked(old_logprobs.detach(), mask)
    advantages = zero_masked(advantages.detach(), mask)

    ratio = (logprobs - old_logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = _mean(torch.maximum(unclipped, clipped), mask, normalizer)

    with torch.no_grad():
        statistics = {
            "ratio_mean": _mean(ratio, mask, normalizer),
            "ratio_max_gap": (ratio - 1).abs().max(),  # a masked token's ratio is 1
            "clip_fraction": _mean(clipped > unclipped, mask, normalizer),
            "approx_kl": _mean(token_kl(old_logprobs, logprobs, "k3"), mask, normalizer),
        }
    return loss, statistics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """Squared error of the values, clipped around the old ones (Engstrom et al. 2020, arXiv 2005.12729, section 3).

        V_clip = clip(V, V_old - clip, V_old + clip)
        loss   = mean of 1/2 max((V - R)^2, (V_clip - R)^2)

    Args:
      values: [b, t] the current value function. The only input that gets a gradient.
      old_values: [b, t] the same at the rollout.
      returns: [b, t] as `gae` gives them.
      mask: [b, t] 1 = real token.
      clip: how far a value may move towards its return before its gradient stops (0.2).
      normalizer: see the module's docstring.

    Returns:
      loss, and: clip_fraction, the fraction of tokens that have no gradient because of the clip; value_mean; return_mean.
    """
    assert_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    values = zero_masked(values, mask)
    old_values = zero_masked(old_values.detach(), mask)
    returns = zero_masked(returns.detach(), mask)

    unclipped = (values - returns).square()
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = 0.5 * _mean(torch.maximum(unclipped, clipped), mask, normalizer)

    with torch.no_grad():
        statistics = {
            "clip_fraction": _mean(clipped > unclipped, mask, normalizer),
            "value_mean": _mean(values, mask, normalizer),
            "return_mean": _mean(returns, mask, normalizer),
        }
    return loss, statistics


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Returns the share of the returns' variance that the values explain.

        1 - var(R - V) / var(R)

    1 is perfect, 0 no better than a constant, below 0 worse. Microbatches' shares do not add up, so `value_loss` has no
    such statistic: call this on the whole batch.

    Args:
      values: [b, t]
      returns: [b, t]
      mask: [b, t] 1 = real token.

    Returns:
      A scalar without gradient; 0 where the returns do not vary.
    """
    assert_same_shape(values=values, returns=returns, mask=mask)
    variance = masked_var(returns, mask)
    explained = 1 - masked_var(returns - values, mask) / variance
    return torch.where(variance > 0, explained, 0)


def _strict_pairs(ranks: Tensor, prompt_index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the positions (better [q], worse [q]) of all pairs of one prompt's completions that do not tie."""
    assert_same_shape(ranks=ranks, prompt_index=prompt_index)
    assert ranks.ndim == 1, f"ranks must be [n], got {tuple(ranks.shape)}"
    same_prompt_nn = prompt_index[:, None] == prompt_index
    better_q, worse_q = torch.nonzero(same_prompt_nn & (ranks[:, None] < ranks), as_tuple=True)
    return better_q, worse_q


def count_ranked_prompts(ranks: Tensor, prompt_index: Tensor) -> int:
    """Returns how many prompts have a strict pair: the normaliser of `ranking_loss`, whose arguments these are."""
    better_q, _ = _strict_pairs(ranks, prompt_index)
    return prompt_index[better_q].unique().numel()


def ranking_loss(
    scores: Tensor, ranks: Tensor, prompt_index: Tensor, normalizer: float | Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """K-wise comparison loss of the reward model: `comparison_loss` of all strict pairs of each prompt's completions.

    Args:
      scores: [n] one per completion. Completions of several prompts follow one another in any order.
      ranks: [n] 0 = best, equal = tie. Compared within a prompt only.
      prompt_index: [n] an integer that names the prompt each completion answers.
      normalizer: see the module's docstring. No prompt may be split over microbatches.

    Returns:
      loss, the statistics of `comparison_loss`, and tied_prompts, the number of prompts without a strict pair.
    """
    assert_same_shape(scores=scores, ranks=ranks)
    better_q, worse_q = _strict_pairs(ranks, prompt_index)
    loss, statistics = comparison_loss(scores[better_q] - scores[worse_q], prompt_index[better_q], normalizer)
    return loss, {**statistics, "tied_prompts": len(prompt_index.unique()) - statistics["prompts"]}


def comparison_loss(
    margin: Tensor, prompt_index: Tensor, normalizer: float | Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """The reward model's loss over pairs of completions (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

        loss = mean over prompts of the mean over its pairs of -log sigmoid(s_better - s_worse)

    All comparisons of a prompt together count as one example, however many there are.

    Args:
      margin: [q] the better completion's score minus the worse one's.
      prompt_index: [q] an integer that names the prompt of each pair.
      normalizer: see the module's docstring. No prompt may be split over microbatches.

    Returns:
      loss, and the counts: pairs; correct_pairs, whose better completion scores higher (equal scores count half); prompts.
      Also accuracy = correct_pairs / pairs, 0 if there are no pairs.
    """
    assert_same_shape(margin=margin, prompt_index=prompt_index)
    ids, prompt_q = prompt_index.unique(return_inverse=True)
    pairs_per_prompt = prompt_q.bincount(minlength=len(ids))
    prompt_means_sum = (-F.logsigmoid(margin) / pairs_per_prompt[prompt_q]).sum()
    loss = prompt_means_sum / (max(len(ids), 1) if normalizer is None else normalizer)

    with torch.no_grad():
        pairs, correct = margin.new_tensor(margin.numel()), correct_pairs(margin).sum()
        statistics = {
            "accuracy": correct / pairs.clamp(min=1),
            "correct_pairs": correct,
            "pairs": pairs,
            "prompts": margin.new_tensor(len(ids)),
        }
    return loss, statistics


def correct_pairs(margin: Tensor) -> Tensor:
    """Returns [q]: 1 where the better completion scores higher, 1/2 where both score the same, else 0."""
    return (margin > 0) + 0.5 * (margin == 0)


def language_model_loss(
    logprobs: Tensor, mask: Tensor, normalizer: float | Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """Cross-entropy of the next token, in nats: supervised fine-tuning and the pretraining mix.

        loss = -mean of log pi(token)

    The pretraining term of Ouyang et al. 2022, arXiv 2203.02155, eq. 2, without its gamma.

    Args:
      logprobs: [b, t] log-probability of each token.
      mask: [b, t] 1 = token to learn from.
      normalizer: see the module's docstring.

    Returns:
      loss, and the count: tokens.
    """
    return -_mean(logprobs, mask, normalizer), {"tokens": mask.bool().sum()}
