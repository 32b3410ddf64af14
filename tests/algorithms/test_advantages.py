import pytest
import torch

from megatron_rlhf.algorithms.advantages import gae

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
