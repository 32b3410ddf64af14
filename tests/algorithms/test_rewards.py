import pytest
import torch

from megatron_rlhf.algorithms.rewards import token_rewards

NAN, INF = float("nan"), float("inf")


def test_by_hand():
    scores = torch.tensor([10.0, 20.0, 30.0, NAN])
    kl = torch.tensor([[1.0, 2.0, NAN], [INF, 3.0, -4.0], [5.0, NAN, 6.0], [NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]])  # right, left and inner padding; nothing at all
    expected = [[-0.5, 9.0, 0.0], [0.0, -1.5, 22.0], [-2.5, 0.0, 27.0], [0.0, 0.0, 0.0]]
    for dtype in (torch.bool, torch.int64, torch.float32):
        assert token_rewards(scores, kl, mask.to(dtype), kl_coef=0.5).tolist() == expected


def test_a_response_sums_to_its_score_minus_its_kl():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, generator=generator, dtype=torch.float64)
    kl = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 8, generator=generator) < 0.5
    assert mask.any(dim=1).all()
    rewards = token_rewards(scores, kl, mask, kl_coef=0.02)
    torch.testing.assert_close(rewards.sum(dim=1), scores - 0.02 * (kl * mask).sum(dim=1))


def test_scores_must_be_one_a_row():
    with pytest.raises(AssertionError, match=r"scores must be \[2\], got \(3,\)"):
        token_rewards(torch.zeros(3), torch.zeros(2, 3), torch.ones(2, 3), 0.02)
