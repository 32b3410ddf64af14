import math

import pytest
import torch
from torch.autograd import gradcheck

from megatron_rlhf.algorithms.losses import (
    count_ranked_prompts,
    explained_variance,
    language_model_loss,
    policy_loss,
    ranking_loss,
    value_loss,
)

NAN, INF = float("nan"), float("inf")


def t64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def items(statistics):
    assert all(value.ndim == 0 and not value.requires_grad for value in statistics.values())
    return {name: value.item() for name, value in statistics.items()}


def combine(parts):
    """Adds up the statistics of microbatches as the module's docstring prescribes."""
    whole = {name: (max if name.endswith("_max_gap") else sum)(p[name] for p in parts) for name in parts[0]}
    if "accuracy" in whole:
        whole["accuracy"] = whole["correct_pairs"] / whole["pairs"]
    return whole


# What holds for every loss over tokens: each takes as many of the three inputs as it has.
TOKEN_LOSSES = {
    "policy": lambda inputs, mask, normalizer=None: policy_loss(*inputs, mask, 0.2, normalizer),
    "value": lambda inputs, mask, normalizer=None: value_loss(*inputs, mask, 0.2, normalizer),
    "language_model": lambda inputs, mask, normalizer=None: language_model_loss(inputs[0], mask, normalizer),
}
every_token_loss = pytest.mark.parametrize("loss_of", TOKEN_LOSSES.values(), ids=TOKEN_LOSSES)


def token_batch():
    """Returns ([x, x_old, target], mask) with x on both sides of the clip and rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    x, noise, target = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [4]])
    return [x, x + 0.3 * noise, target], mask


@every_token_loss
def test_gradient_check(loss_of):
    (x, *rest), mask = token_batch()
    assert gradcheck(lambda x: loss_of([x, *rest], mask)[0], (x.requires_grad_(),))


@every_token_loss
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_garbage_reaches_neither_value_nor_gradient(loss_of, garbage, dtype):
    clean, mask = token_batch()
    dirty = [torch.where(mask, x, garbage) for x in clean]
    clean[0].requires_grad_()
    dirty[0].requires_grad_()

    (clean_loss, clean_statistics), (loss, statistics) = loss_of(clean, mask), loss_of(dirty, mask.to(dtype))
    clean_loss.backward()
    with torch.autograd.detect_anomaly():  # no NaN in intermediate results either
        loss.backward()
    assert loss == clean_loss
    assert items(statistics) == items(clean_statistics)
    assert torch.equal(dirty[0].grad, clean[0].grad)
    assert dirty[0].grad[~mask].eq(0).all()


@every_token_loss
def test_empty_mask_is_zero_with_gradient_zero(loss_of):
    inputs, mask = token_batch()
    inputs[0].requires_grad_()
    loss, statistics = loss_of(inputs, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert set(items(statistics).values()) == {0.0}
    assert inputs[0].grad.eq(0).all()


@every_token_loss
@pytest.mark.parametrize("as_tensor", [False, True])
def test_microbatches_sum_to_the_batch(loss_of, as_tensor):
    inputs, mask = token_batch()
    x = inputs[0].requires_grad_()
    loss, statistics = loss_of(inputs, mask)
    loss.backward()
    whole_grad, x.grad = x.grad, None

    normalizer = mask.sum() if as_tensor else float(mask.sum())
    parts = [loss_of([i[rows] for i in inputs], mask[rows], normalizer) for rows in (slice(0, 1), slice(1, 4))]
    for part, _ in parts:
        part.backward()
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    torch.testing.assert_close(x.grad, whole_grad)
    assert combine([items(part) for _, part in parts]) == pytest.approx(items(statistics), rel=1e-12)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_only_the_first_input_gets_a_gradient(loss):
    inputs, mask = token_batch()
    for x in inputs:
        x.requires_grad_()
    loss(*inputs, mask, 0.2)[0].backward()
    assert [x.grad is not None for x in inputs] == [True, False, False]


def test_policy_loss_by_hand():
    # clip 0.2    A   ratio  clipped   -A ratio  -A clipped   max    gradient -A ratio, or none
    #             2    1.1     1.1       -2.2       -2.2     -2.2     -2.2
    #             2    1.5     1.2       -3         -2.4     -2.4      0      far enough up
    #             2    0.5     0.8       -1         -1.6     -1       -1      came down: back up
    #            -4    1.5     1.2        6          4.8      6        6      came up: back down
    #            -4    0.5     0.8        2          3.2      3.2      0      far enough down
    # loss = 3.6 / 5
    ratio = t64([[1.1, 1.5, 0.5, 1.5, 0.5]])
    advantages = t64([[2, 2, 2, -4, -4]])
    old_logprobs = t64([[-1, -2, -3, -4, -5]])
    logprobs = (old_logprobs + ratio.log()).requires_grad_()
    loss, statistics = policy_loss(logprobs, old_logprobs, advantages, torch.ones(1, 5), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(3.6 / 5, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, t64([[-2.2, 0, -1, 6, 0]]) / 5)
    k3 = 0.1 - math.log(1.1) + 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))
    assert items(statistics) == pytest.approx(
        {"ratio_mean": 5.1 / 5, "ratio_max_gap": 0.5, "clip_fraction": 2 / 5, "approx_kl": k3 / 5}
    )


def test_policy_loss_on_the_first_update_is_the_policy_gradient():
    (logprobs, _, advantages), mask = token_batch()
    logprobs.requires_grad_()
    loss, statistics = policy_loss(logprobs, logprobs.detach(), advantages, mask, clip=0.2)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages / mask.sum(), 0))
    assert items(statistics) == {"ratio_mean": 1.0, "ratio_max_gap": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0}


def test_value_loss_by_hand():
    # clip 0.2, V_old = 0   R     V    V_clip   (V-R)^2  (V_clip-R)^2   gradient V - R, or none
    #                       1    0.1    0.1      0.81       0.81        -0.9
    #                       1    0.5    0.2      0.25       0.64         0     towards R: far enough
    #                       1   -0.5   -0.2      2.25       1.44        -1.5   away from R: back
    #                       0    0.4    0.2      0.16       0.04         0.4
    # loss = (0.81 + 0.64 + 2.25 + 0.16) / 2 / 4
    values = t64([[0.1, 0.5], [-0.5, 0.4]]).requires_grad_()
    returns = t64([[1, 1], [1, 0]])
    loss, statistics = value_loss(values, t64([[0, 0], [0, 0]]), returns, torch.ones(2, 2), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(3.86 / 8, rel=1e-12)
    torch.testing.assert_close(values.grad, t64([[-0.9, 0], [-1.5, 0.4]]) / 4)
    expected = {"clip_fraction": 1 / 4, "value_mean": 0.5 / 4, "return_mean": 3 / 4}
    assert items(statistics) == pytest.approx(expected, rel=1e-12)


def test_value_clip_fraction_is_not_fooled_by_rounding():
    generator = torch.Generator().manual_seed(0)
    values, old_values = 0.1 * torch.rand(2, 100, 100, generator=generator)  # all within the clip
    _, statistics = value_loss(values, old_values, torch.zeros(100, 100), torch.ones(100, 100), clip=0.2)
    assert statistics["clip_fraction"] == 0


def test_explained_variance():
    returns, mask = t64([[1, 3, NAN], [5, 7, INF]]), torch.tensor([[1, 1, 0], [1, 1, 0]])  # variance 20 / 3
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(returns + 5, returns, mask) == 1
    assert explained_variance(torch.zeros(2, 3), returns, mask) == 0
    # R - V = 1, -1, 1, -1: variance 4 / 3.
    assert explained_variance(t64([[0, 4, 0], [4, 8, 0]]), returns, mask).item() == pytest.approx(0.8, rel=1e-12)
    assert explained_variance(returns, torch.ones(2, 3), mask) == 0


def softplus(x):
    return math.log(1 + math.exp(x))


def test_ranking_loss_of_one_pair():
    # -log sigmoid(2 - 1) and its derivative by the better score, sigmoid(1) - 1
    scores = t64([1, 2]).requires_grad_()
    loss, statistics = ranking_loss(scores, torch.tensor([1, 0]), torch.tensor([7, 7]))
    loss.backward()
    assert loss.item() == pytest.approx(softplus(-1), rel=1e-12)
    pull = 1 / (1 + math.e)
    torch.testing.assert_close(scores.grad, t64([pull, -pull]))
    assert items(statistics) == {"accuracy": 1.0, "correct_pairs": 1.0, "pairs": 1, "prompts": 1, "tied_prompts": 0}


def test_ranking_loss_by_hand():
    # prompt 30: scores 1, 0, 3 ranked 0, 1, 2     three pairs, margins 1 - 0, 1 - 3, 0 - 3
    # prompt -5: scores 2, 2, 5 ranked 1, 0, 1     two pairs, margins 2 - 2, 2 - 5; the tie is not a pair
    # prompt 8:  scores 4, 9    ranked 0, 0        all tie
    # prompt 2:  score 6                           alone
    prompt_index = torch.tensor([30, -5, 8, 30, 2, -5, 30, 8, -5])
    ranks = torch.tensor([0, 1, 0, 1, 3, 0, 2, 0, 1])
    scores = t64([1, 2, 4, 0, 6, 2, 3, 9, 5]).requires_grad_()
    loss, statistics = ranking_loss(scores, ranks, prompt_index)
    loss.backward()
    first = (softplus(-1) + softplus(2) + softplus(3)) / 3
    second = (softplus(0) + softplus(3)) / 2
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
    # A pair pulls its scores apart by sigmoid(-margin) / its prompt's pairs / 2 prompts.
    a, b, c = (1 / (1 + math.exp(margin)) / 6 for margin in (1, -2, -3))
    d, e = (1 / (1 + math.exp(margin)) / 4 for margin in (0, -3))
    torch.testing.assert_close(scores.grad, t64([-a - b, d, 0, a - c, 0, -d - e, b + c, 0, e]))
    # One margin of five is positive and one is 0.
    assert items(statistics) == pytest.approx(
        {"accuracy": 0.3, "correct_pairs": 1.5, "pairs": 5, "prompts": 2, "tied_prompts": 2}
    )
    assert count_ranked_prompts(ranks, prompt_index) == 2


def test_ranking_loss_gradient_check_and_order():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, generator=generator, dtype=torch.float64).requires_grad_()
    ranks = torch.randint(4, (24,), generator=generator)
    prompt_index = torch.randint(5, (24,), generator=generator)
    assert gradcheck(lambda scores: ranking_loss(scores, ranks, prompt_index)[0], (scores,))

    loss, statistics = ranking_loss(scores, ranks, prompt_index)
    order = torch.randperm(24, generator=generator)
    shuffled, shuffled_statistics = ranking_loss(scores[order], ranks[order], prompt_index[order])
    torch.testing.assert_close(shuffled, loss)
    assert items(shuffled_statistics) == items(statistics)
    torch.testing.assert_close(ranking_loss(scores + 100, ranks, prompt_index)[0], loss)


def test_ranking_microbatches_sum_to_the_batch():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, generator=generator, dtype=torch.float64).requires_grad_()
    ranks = torch.randint(4, (24,), generator=generator)
    prompt_index = torch.randint(5, (24,), generator=generator)
    ranks[prompt_index == 3] = 0  # a prompt whose responses all tie
    loss, statistics = ranking_loss(scores, ranks, prompt_index)
    loss.backward()
    whole_grad, scores.grad = scores.grad, None

    normalizer = count_ranked_prompts(ranks, prompt_index)
    parts = [
        ranking_loss(scores[rows], ranks[rows], prompt_index[rows], normalizer)
        for rows in (prompt_index < 2, prompt_index == 3, (prompt_index == 2) | (prompt_index == 4))
    ]
    for part, _ in parts:
        part.backward()
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    torch.testing.assert_close(scores.grad, whole_grad)
    assert combine([items(part) for _, part in parts]) == pytest.approx(items(statistics))


def test_ranking_loss_without_a_strict_pair():
    scores = t64([1, 2, 3]).requires_grad_()
    ranks, prompt_index = torch.tensor([0, 0, 1]), torch.tensor([4, 4, 5])
    loss, statistics = ranking_loss(scores, ranks, prompt_index)
    loss.backward()
    assert loss == 0
    assert scores.grad.eq(0).all()
    assert items(statistics) == {"accuracy": 0.0, "correct_pairs": 0.0, "pairs": 0, "prompts": 0, "tied_prompts": 2}
    assert count_ranked_prompts(ranks, prompt_index) == 0


def test_ranking_loss_is_finite_for_far_scores():
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss, _ = ranking_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2e4
    assert scores.grad.tolist() == [-1.0, 1.0]


def test_language_model_loss_by_hand():
    logprobs = t64([[-1, -2, NAN], [-6, NAN, NAN]]).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss, statistics = language_model_loss(logprobs, mask)
    loss.backward()
    assert loss.item() == 3.0
    torch.testing.assert_close(logprobs.grad, -mask / t64(3))
    assert items(statistics) == {"tokens": 3}
