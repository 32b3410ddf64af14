import math

import pytest
import torch

from megatron_rlhf.algorithms.kl import AdaptiveKLController, FixedKLController, token_kl


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # log-ratios ln 2 and -ln 4, so pi_ref / pi is 1/2 and 4
        ("k1", [math.log(2), -math.log(4)]),
        ("k2", [math.log(2) ** 2 / 2, math.log(4) ** 2 / 2]),
        ("k3", [1 / 2 - 1 + math.log(2), 4 - 1 - math.log(4)]),
        ("abs", [math.log(2), math.log(4)]),
    ],
)
def test_by_hand(estimator, expected):
    logprobs = torch.tensor([[0.5, 0.1]], dtype=torch.float64).log()
    ref_logprobs = torch.tensor([[0.25, 0.4]], dtype=torch.float64).log()
    expected = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(token_kl(logprobs, ref_logprobs, estimator), expected)


def test_default_is_k1():
    assert token_kl(torch.tensor([[-1.0]]), torch.tensor([[-3.0]])).tolist() == [[2.0]]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence(estimator):
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    divergence = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.6)
    average = (policy * token_kl(policy.log(), reference.log(), estimator)).sum()
    assert average.item() == pytest.approx(divergence, rel=1e-12)


def test_k3_keeps_its_digits_for_a_small_gap():
    # exp(-x) - 1 + x = x^2/2 - x^3/6 + ... In float32, exp(-x) - 1 by subtraction would be wrong by up to 3e-8, or 6%.
    gap = token_kl(torch.tensor([[1e-3]]), torch.tensor([[0.0]]), "k3")
    assert gap.item() == pytest.approx(5e-7 - 1e-9 / 6, rel=1e-3)


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"unknown KL estimator 'k4'; choose one of k1, k2, k3, abs"):
        token_kl(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_fixed_controller_stays():
    controller = FixedKLController(0.02)
    controller.update(kl=100.0, n=512)
    controller.load_state_dict(controller.state_dict())
    assert controller.coef == 0.02


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 0.5),  # 10% over, n / horizon = 1/2
        (5.4, 1 - 0.1 * 0.5),
        (60.0, 1 + 0.2 * 0.5),  # clipped
        (0.0, 1 - 0.2 * 0.5),
        (-3.0, 1 - 0.2 * 0.5),
    ],
)
def test_adaptive_controller_by_hand(kl, factor):
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    controller.update(kl, n=500)
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_controller_takes_a_tensor_and_stays_a_float():
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    controller.update(torch.tensor(6.6), n=500)
    assert type(controller.coef) is float


def test_adaptive_controller_does_not_hide_a_nan():
    controller = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    controller.update(float("nan"), n=500)
    assert math.isnan(controller.coef)


def test_adaptive_controller_resumes_exactly():
    straight, interrupted = (AdaptiveKLController(coef=0.1, target=6.0, horizon=1000) for _ in range(2))
    for kl in (6.5, 7.0):
        straight.update(kl, n=64)
    interrupted.update(6.5, n=64)
    resumed = AdaptiveKLController(coef=0.1, target=6.0, horizon=1000)
    resumed.load_state_dict(interrupted.state_dict())
    resumed.update(7.0, n=64)
    assert resumed.coef == straight.coef
