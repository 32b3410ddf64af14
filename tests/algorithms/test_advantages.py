import statistics

import pytest
import torch

from megatron_rlhf.algorithms.advantages import gae, grpo, reinforce_baseline, returns_to_go, rloo

NAN = float("nan")


def random_batch(b=3, t=6, real=1.0):
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, b, t, generator=generator, dtype=torch.float64)
    return rewards, values, torch.rand(b, t, generator=generator) < real


def definition(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} over one row of real tokens, as sums over Python floats."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_by_hand():
    # gamma = lam = 1/2, so gamma lam = 1/4.
    # delta_2 = 8 - 4 = 4;  delta_1 = 0 + 4/2 - 2 = 0;  delta_0 = 1 + 2/2 - 6 = -4
    # A_2 = 4;  A_1 = 0 + 4/4 = 1;  A_0 = -4 + 1/4 = -3.75
    rewards, values = torch.tensor([[1.0, 0.0, 8.0]]), torch.tensor([[6.0, 2.0, 4.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-3.75, 1.0, 4.0]]
    assert returns.tolist() == [[2.25, 3.0, 8.0]]


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 0, 0, 1, 1]])
def test_masked_positions_are_skipped_over(mask):
    # The tokens of the case above, spread out.
    mask = torch.tensor([mask])
    real = mask.bool()
    rewards, values = torch.full((1, 5), NAN), torch.full((1, 5), NAN)
    rewards[real], values[real] = torch.tensor([1.0, 0.0, 8.0]), torch.tensor([6.0, 2.0, 4.0])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages[real].tolist() == [-3.75, 1.0, 4.0]
    assert returns[real].tolist() == [2.25, 3.0, 8.0]
    assert advantages[~real].eq(0).all()
    assert returns[~real].eq(0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
def test_against_the_definition(gamma, lam):
    rewards, values, mask = random_batch(real=0.7)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        real = mask[row]
        expected = definition(rewards[row, real].tolist(), values[row, real].tolist(), gamma, lam)
        torch.testing.assert_close(advantages[row, real], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, torch.where(mask, advantages + values, 0))


def test_defaults_are_no_discount_and_lambda_095():
    rewards, values, mask = random_batch()
    assert torch.equal(gae(rewards, values, mask)[0], gae(rewards, values, mask, 1.0, 0.95)[0])


def test_lambda_1_is_the_discounted_return_minus_the_value():
    rewards, values, mask = random_batch()
    discounts = 0.9 ** torch.arange(6, dtype=torch.float64)
    discounted_returns = torch.stack([(rewards[:, t:] * discounts[: 6 - t]).sum(dim=1) for t in range(6)], dim=1)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(advantages, discounted_returns - values)
    torch.testing.assert_close(returns, discounted_returns)


def test_lambda_0_is_the_one_step_error():
    rewards, values, mask = random_batch()
    next_values = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * next_values - values)


def test_values_that_foretell_the_return_leave_no_advantage():
    rewards, _, mask = random_batch()
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask)
    torch.testing.assert_close(advantages, torch.zeros_like(values))
    torch.testing.assert_close(returns, values)


def test_no_gradient_and_inputs_untouched():
    rewards, values, mask = random_batch(real=0.7)
    before = rewards.clone(), values.clone()
    advantages, returns = gae(rewards.requires_grad_(), values.requires_grad_(), mask)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])


# Two prompts, 7 and 3, their samples mixed: 7 has scores 1, 4, 7; 3 has 2, 8.
SCORES, PROMPTS = torch.tensor([1.0, 2.0, 4.0, 8.0, 7.0]), torch.tensor([7, 3, 7, 3, 7])


def test_rloo_by_hand():
    # 1 - (4 + 7) / 2, 2 - 8, 4 - (1 + 7) / 2, 8 - 2, 7 - (1 + 4) / 2
    assert rloo(SCORES, PROMPTS).tolist() == [-4.5, -6.0, 0.0, 6.0, 4.5]


def test_grpo_by_hand():
    # Mean 4, deviations -3, 0, 3, unbiased std 3; mean 5, deviations -3, 3, unbiased std sqrt(18).
    expected = [-1.0, -3 / 18**0.5, 0.0, 3 / 18**0.5, 1.0]
    torch.testing.assert_close(grpo(SCORES, PROMPTS, eps=0.0), torch.tensor(expected))
    torch.testing.assert_close(grpo(SCORES, PROMPTS, eps=3.0)[0], torch.tensor(-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_against_the_definition(dtype):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(40, generator=generator, dtype=dtype)
    prompts = torch.arange(40) % 7
    for i, (score, prompt) in enumerate(zip(scores.tolist(), prompts.tolist(), strict=True)):
        own = [s for j, s in enumerate(scores.tolist()) if prompts[j] == prompt]
        others = [s for j, s in enumerate(scores.tolist()) if prompts[j] == prompt and j != i]
        assert float(rloo(scores, prompts)[i]) == pytest.approx(score - statistics.fmean(others), rel=1e-5, abs=1e-6)
        standardised = (score - statistics.fmean(own)) / (statistics.stdev(own) + 1e-4)
        assert float(grpo(scores, prompts)[i]) == pytest.approx(standardised, rel=1e-5, abs=1e-6)
    assert rloo(scores, prompts).dtype == grpo(scores, prompts).dtype == dtype


def test_equal_scores_have_no_advantage():
    """The mean of three times 0.1 is not 0.1 in fp32, and a standard deviation of that rounding would be all that is left."""
    for value in (0.1, 0.7, -3.3):
        for count in (2, 3, 5, 7):
            scores, prompts = torch.full([count], value), torch.zeros(count, dtype=torch.long)
            assert rloo(scores, prompts).abs().max() < 1e-6
            assert grpo(scores, prompts).abs().max() < 1e-6


@pytest.mark.parametrize("compare", [rloo, grpo])
def test_one_sample_is_an_error(compare):
    with pytest.raises(AssertionError, match="at least two samples"):
        compare(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_another_prompt_has_no_influence():
    changed = SCORES.clone()
    changed[PROMPTS == 3] = 1000.0
    for compare in (rloo, grpo):
        assert compare(changed, PROMPTS)[PROMPTS == 7].tolist() == compare(SCORES, PROMPTS)[PROMPTS == 7].tolist()


def test_returns_to_go_by_hand():
    rewards, mask = torch.tensor([[1.0, NAN, 4.0, 8.0]]), torch.tensor([[1, 0, 1, 1]])
    # 8; 4 + 8/2; 1 + 8/2
    assert returns_to_go(rewards, mask, gamma=0.5).tolist() == [[5.0, 0.0, 8.0, 8.0]]


def test_reinforce_baseline_by_hand():
    # Returns to go 3, 4 | 7, 6 | 1 | 1; whole returns 3 and 7 of prompt 0, whose mean is 5, and 1 and 1 of prompt 9.
    rewards = torch.tensor([[-1.0, 4.0], [1.0, 6.0], [1.0, NAN], [1.0, NAN]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]])
    advantages = reinforce_baseline(rewards, mask, torch.tensor([0, 0, 9, 9]))
    assert advantages.tolist() == [[-2.0, -1.0], [2.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
