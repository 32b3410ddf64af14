"""Advantages of a rollout among the samples of a prompt, by hand."""

import pytest
import torch

from megatron_rlhf.algorithms.rewards import token_rewards
from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.stages import PPOConfig
from megatron_rlhf.rollout.types import Completion, Responses, Rollout
from megatron_rlhf.trainers.episodes.advantages import estimate_advantages

KL = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.5, 0.5]])


def advantages(estimator: str, scores: list[float], kl_bt: torch.Tensor, gamma: float) -> list[list[float]]:
    """Three samples of one prompt: of two tokens and of one that ends, and of two that do not, which costs 0.25."""
    given = [f"ppo.advantages={estimator}", f"ppo.gamma={gamma}", "ppo.missing_stop_penalty=0.25"]
    config, _ = compose_config("ppo", PPOConfig, given, missing="-")
    samples = [Completion([5] * n, [-1.0] * n, stopped) for n, stopped in ((2, True), (1, True), (2, False))]
    responses = Responses.pack([[7]] * 3, samples, 0, torch.device("cpu"))
    zeros = torch.zeros(3, 2)
    rollout = Rollout(responses, zeros, zeros, zeros, zeros, torch.tensor(scores), torch.zeros(3, dtype=torch.long))
    rewards = token_rewards(rollout.totals(0.25), kl_bt, rollout.mask_bt, 0.1)
    return estimate_advantages(rewards, rollout, config.ppo)[0].tolist()


def test_grpo_standardises_scores_and_compares_penalties_as_they_are():
    # Totals 1, 4, 7: mean 4, standard deviation 3. Penalties -0.1 - 0.5 * 0.2, -0.3 and -0.05 - 0.5 * 0.05.
    penalties = [-0.2, -0.3, -0.075]
    expected = [
        (total - 4) / 3.0001 + mine - (sum(penalties) - mine) / 2
        for total, mine in zip((1, 4, 7), penalties, strict=True)
    ]
    got = advantages("grpo", [1.0, 4.0, 7.25], KL, gamma=0.5)
    assert got[0] == pytest.approx([expected[0]] * 2, abs=1e-6)
    assert got[1] == pytest.approx([expected[1], 0], abs=1e-6)
    assert got[2] == pytest.approx([expected[2]] * 2, abs=1e-6)


def test_rloo_compares_whole_returns():
    returns = [1 * 0.5 - 0.2, 4 - 0.3, 7 * 0.5 - 0.075]
    expected = [mine - (sum(returns) - mine) / 2 for mine in returns]
    got = advantages("rloo", [1.0, 4.0, 7.25], KL, gamma=0.5)
    assert [row[0] for row in got] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3])
def test_equal_scores_leave_advantages_as_small_as_the_penalties(size):
    """Rounding of log-probabilities, or little KL, is no reason to learn."""
    got = advantages("grpo", [1.0, 1.0, 1.25], size * KL, gamma=1.0)
    assert max(abs(each) for row in got for each in row) <= 0.1 * size * 3 + 1e-6
